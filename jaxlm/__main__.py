"""`jaxlm` and `python -m jaxlm`: the process as a run wants it, then the front door."""

import os
import sys

from jaxlm.console.streams import steady


def main() -> int:
    """Runs the command line of this process."""
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # `~` would be the root of all files
    steady()
    _ask_for_huge_pages()
    from jaxlm.cli import main

    return main()


def _ask_for_huge_pages() -> None:
    """Starts this process over with a malloc that takes huge pages, which glibc offers at its start only.

    XLA's CPU backend allocates a step's temporary memory anew each step; in pages of 4 KiB, the kernel's work of
    handing them over is a sixth of the step (docs/lab-notes.md).
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError as error:  # an interpreter that has been replaced since, or a system that lets nobody start another
            print(f"WARNING: no huge pages, steps may take a sixth longer: {sys.executable}: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
