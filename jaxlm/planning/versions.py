"""Which compiler of TPUs or GPUs is installed beside JAX, and whether it is the one that JAX asks for."""

import functools
from importlib import metadata

from packaging.requirements import Requirement

from jaxlm.console.progress import print_line
from jaxlm.errors import clipped

# What has to be installed for a platform: distributions, JAX's extra that asks for the first, and ours.
COMPILERS = {"tpu": (("libtpu",), "tpu", "tpu"), "gpu": (("jax-cuda13-plugin", "jax-cuda13-pjrt"), "cuda13", "cuda")}


def how_to_install(platform: str) -> str:
    """`pip install 'jaxlm[tpu]'`"""
    return f"pip install 'jaxlm[{COMPILERS[platform][2]}]'"


def installed(platform: str) -> str:
    """`jax 0.10.2, libtpu 0.0.42.1`"""
    names, *_ = COMPILERS.get(platform, (("jaxlib",),))
    return ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("jax", *names[:1]))


def mismatch(platform: str) -> str | None:
    """What is wrong with the compiler's version, and what to install; None: nothing."""
    names, extra, _ = COMPILERS.get(platform, ((), "", ""))
    asked = next((one for one in _asked_by_jax() if names and one.name == names[0]
                  and one.marker and one.marker.evaluate({"extra": extra})), None)
    for name in names if asked else ():
        found = _version(name)
        if found and not asked.specifier.contains(found, prereleases=True):
            wanted = ",".join(sorted({str(one).replace("<=", "==").replace(">=", "==") for one in asked.specifier}))
            return (f"{name} {found} is not what jax {_version('jax')} asks for: pip install "
                    + " ".join(f"'{one}{wanted}'" for one in names))
    return None


def told_in_a_line(error: Exception, platform: str) -> str:
    """A compiler's own failure: what it says, which versions they are, and whether others would be right."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    advice = mismatch(platform) or "the versions are those that JAX asks for: please report it"
    return f"the compiler failed ({installed(platform)}): {clipped(said)}; {advice}"


@functools.cache
def warn_of_mismatch(platform: str) -> None:
    """One line on stderr, once."""
    if problem := mismatch(platform):
        print_line(f"jaxlm: warning: {problem}")


def _asked_by_jax() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires("jax") or ()]
    except metadata.PackageNotFoundError:  # run from a source tree
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
