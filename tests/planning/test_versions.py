"""Line 12: compilers that are missing, of another version than JAX asks for, or that fail."""

from importlib import metadata
from types import SimpleNamespace

import jax
import pytest

from jaxlm import cli
from jaxlm.errors import RunError
from jaxlm.planning import compiled_plan, devices, versions
from jaxlm.planning.lowering import DoesNotFit
from jaxlm.planning.lowering import compiled as compile_lowered

RET_CHECK = "INTERNAL: RET_CHECK failure (platforms/xla/service/jellyfish/x.cc:1) async-update\n*** begin stack ***\nmore"
ASKED = ['libtpu==0.0.42.*; extra == "tpu"', 'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"', "numpy>=2"]


@pytest.fixture
def installed(monkeypatch):
    """`installed(libtpu="0.0.52")`: what is said to be there beside jax 0.10.2."""
    def say(**found):
        found = {"jax": "0.10.2"} | {name.replace("_", "-"): version for name, version in found.items()}

        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(versions.metadata, "version", version)
        monkeypatch.setattr(versions.metadata, "requires", lambda name: ASKED)

    versions.warn_of_mismatch.cache_clear()
    yield say
    versions.warn_of_mismatch.cache_clear()


@pytest.mark.parametrize(("platform", "found", "wrong"), [
    ("tpu", {"libtpu": "0.0.42.1"}, None),
    ("tpu", {"libtpu": "0.0.52"}, "libtpu 0.0.52 is not what jax 0.10.2 asks for: pip install 'libtpu==0.0.42.*'"),
    ("gpu", {"jax_cuda13_plugin": "0.10.2", "jax_cuda13_pjrt": "0.10.2"}, None),
    ("gpu", {"jax_cuda13_plugin": "0.10.2", "jax_cuda13_pjrt": "0.12.0"}, "jax-cuda13-pjrt 0.12.0 is not what jax 0.10.2 asks "
     "for: pip install 'jax-cuda13-plugin==0.10.2' 'jax-cuda13-pjrt==0.10.2'"),
    ("cpu", {}, None),
])
def test_the_version_that_jax_asks_for(platform, found, wrong, installed, capsys):
    installed(**found)
    assert versions.mismatch(platform) == wrong
    versions.warn_of_mismatch(platform)
    versions.warn_of_mismatch(platform)  # once
    assert capsys.readouterr().err == (f"jaxlm: warning: {wrong}\n" if wrong else "")


@pytest.mark.parametrize(("found", "advice"), [("0.0.52", "pip install 'libtpu==0.0.42.*'"), ("0.0.42.1", "please report it")])
@pytest.mark.parametrize("words", [RET_CHECK, "UNIMPLEMENTED: not supported", "INVALID_ARGUMENT: no", "DEADLINE_EXCEEDED"])
def test_a_compilers_own_failure_is_one_line_with_both_versions(words, found, advice, installed):
    installed(libtpu=found)

    def fail():
        raise jax.errors.JaxRuntimeError(words)

    tpus = SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(platform="tpu")]))
    with pytest.raises(RunError) as error:
        compile_lowered(SimpleNamespace(compile=fail), tpus)
    line = str(error.value)
    assert "\n" not in line and words.splitlines()[0] in line and advice in line
    assert f"jax 0.10.2, libtpu {found}" in line


@pytest.mark.parametrize(("target", "extra"), [("v5e:2x4", "pip install 'jaxlm[tpu]'"), ("h100:8", "pip install 'jaxlm[cuda]'")])
def test_what_is_missing_names_the_extra(target, extra, monkeypatch, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 1000}")
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--target", target]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and extra in err


OOM = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
       "(30.00G) exceeds available HBM (15.75G). HLO module: jit_f.")


def test_what_the_compiler_refuses_shows_the_whole_table(monkeypatch, tmp_path, capsys):
    """Line 21: memory is what the compiler says, the state beside it; all else is the estimate's."""
    def refuse(settings, target):
        raise DoesNotFit(OOM)

    monkeypatch.setattr(compiled_plan, "compile_program", refuse)
    (tmp_path / "run.yaml").write_text("model: {vocab_size: 1000, hidden_size: 128, num_heads: 2}")
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--target", "v5e:2x2", "data.global_batch_size=8"]) == 0
    out = capsys.readouterr().out
    for words in ("the compiler refuses", "DOES NOT FIT, 14.2", "what helps", "memory of a device", "sent by a device", "MFU"):
        assert words in out
    plan = compiled_plan.compiled_plan(*settings_and_target(tmp_path))
    assert plan.fits is False and plan.memory.total == plan.memory.arguments + 30 * 2**30


def settings_and_target(folder):
    from jaxlm import config
    from jaxlm.planning.targets import find_target

    return config.load(folder / "run.yaml", ["data.global_batch_size=8"]), find_target("v5e:2x2")
