"""What cannot be saved, opened or called is told in words; a damaged file never computes something else."""

import contextlib
import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax.experimental import io_callback

import jaxprune
from jaxprune import export
from jaxprune._cli._parser import main
from jaxprune.storage import StorageError

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3)}
X = jnp.ones((4, 2))


def apply(params: Any, x: Any, *more: Any) -> Any:
    return x @ params["a"]["kernel"] + params["b"][None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "b"
    export.save(path, apply, PARAMS, jax.ShapeDtypeStruct(("batch", 2), jnp.float32), metrics={"loss": 1.5})
    return path.read_bytes()


def rewrite(whole: bytes, path: Path, **changed: Any) -> Path:
    """Write a bundle anew: parts replaced or left out, with right checksums; `about` changes what is said."""
    (path.parent / "whole").write_bytes(whole)
    with zipfile.ZipFile(path.parent / "whole") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(parts.pop("bundle.json"))
    for name, data in changed.pop("parts", {}).items():
        parts[name] = data(parts[name]) if callable(data) else data
        about["sha256"][name] = hashlib.sha256(parts[name]).hexdigest()
    for name in changed.pop("without", ()):
        del parts[name]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        archive.writestr("bundle.json", json.dumps(about | changed.pop("about", {})))
    return path


def refused(path: Path) -> str:
    with pytest.raises(StorageError) as caught:
        export.load(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_truncated(whole: bytes, tmp_path: Path):
    path = tmp_path / "b"
    for length in [*range(4, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "is damaged, or a part of a file" in refused(path)


@pytest.mark.slow
def test_a_flipped_bit(whole: bytes, tmp_path: Path):
    """Either it is told, or it lies where nothing is said, as the time of a part in the zip."""
    path, opened = tmp_path / "b", 0
    positions = [*range(0, len(whole), 61), *range(len(whole) - 320, len(whole))]
    for at in positions:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with contextlib.suppress(StorageError):
            bundle = export.load(path)
            assert bundle.metrics == {"loss": 1.5}
            np.testing.assert_array_equal(bundle.params["a"]["kernel"], PARAMS["a"]["kernel"])
            opened += 1
    assert 0 < opened < len(positions) * 0.4


@pytest.mark.parametrize("name", ["program.jax", "params.safetensors"])
def test_one_part(name: str, whole: bytes, tmp_path: Path):
    with zipfile.ZipFile(rewrite(whole, tmp_path / "b")) as archive:
        info, data = archive.getinfo(name), archive.read(name)
    damaged = bytearray(whole)
    damaged[whole.index(data[40:80]) + 20] ^= 1
    (tmp_path / "b").write_bytes(damaged)
    assert f"is damaged: its part {name} has another checksum" in refused(tmp_path / "b")
    assert info.file_size == len(data)
    assert f"lacks its part {name}" in refused(rewrite(whole, tmp_path / "b", without=[name]))


def test_what_is_no_bundle(whole: bytes, tmp_path: Path):
    path = tmp_path / "b"
    jaxprune.save_sparse(path, PARAMS)
    assert "is no bundle of export.save; a file of parameters alone is opened by load_sparse" in refused(path)
    path.write_bytes(b"")
    assert "is no bundle" in refused(path)
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    assert "is a zip without bundle.json" in refused(tmp_path / "arrays.npz")
    assert "of another kind" in refused(rewrite(whole, path, about={"format": "other"}))
    assert "which is none" in refused(rewrite(whole, path, about={"version": "1"}))
    assert "says of itself in bundle.json what cannot be read" in refused(rewrite(whole, path, about={"metrics": 3}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bundle.json", "{")
    assert "has a bundle.json that cannot be read" in refused(path)
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "missing")


def test_versions(whole: bytes, tmp_path: Path, capfd: pytest.CaptureFixture):
    message = refused(rewrite(whole, tmp_path / "b", about={"version": 2}))
    assert "is a bundle of version 2, and this jaxprune reads up to 1; install a newer one" in message

    def of_another_time(program: bytes) -> bytes:
        at = program.index(b"ML\xefR") + 4  # the version of MLIR's bytecode stands behind this
        return program[:at] + bytes([201]) + program[at + 1 :]

    said = {"versions": {"jax": "0.4.30"}, "date": "2020-01-02T03:04:05"}
    message = refused(rewrite(whole, tmp_path / "b", parts={"program.jax": of_another_time}, about=said))
    assert "has a program of jax 0.4.30, 2020-01-02, which jax " in message
    assert "Open it with a jax of that time, and save the function anew" in message
    assert "bytecode version 100" in capfd.readouterr().err  # what MLIR prints of it
    refused(rewrite(whole, tmp_path / "b", parts={"program.jax": b"nonsense" * 9}))


def test_parameters_that_are_not_the_programs(whole: bytes, tmp_path: Path):
    def part(params: Any) -> bytes:
        jaxprune.save_sparse(tmp_path / "params", params, force=True)
        return (tmp_path / "params").read_bytes()

    def load(params: Any) -> str:
        return refused(rewrite(whole, tmp_path / "b", parts={"params.safetensors": part(params)}))

    assert "tensor 'b' is missing" in load({"a": PARAMS["a"]})
    assert "tensor 'c' is none that the program takes" in load(PARAMS | {"c": X})
    assert "tensor 'b' has the shape (2,), and the program takes float32[3]" in load(PARAMS | {"b": jnp.ones(2)})
    assert "has a header that is not JSON" in refused(
        rewrite(whole, tmp_path / "b", parts={"params.safetensors": lambda data: data[:8] + b"x" + data[9:]})
    )


def test_calls(whole: bytes, tmp_path: Path):
    path = tmp_path / "b"
    path.write_bytes(whole)
    bundle = export.load(path)
    cases = [
        ((), {}, r"takes 1 input \(inputs\[0\] float32\[batch, 2\]\), and was given 0"),
        ((X, X), {}, "takes 1 input .*, and was given 2"),
        ((X[:, :1],), {}, r"takes float32\[batch, 2\] for inputs\[0\], and was given float32\[4, 1\]"),
        ((X[0],), {}, r"for inputs\[0\], and was given float32\[2\]"),
        ((X.astype(jnp.int32),), {}, r"for inputs\[0\], and was given int32\[4, 2\]"),
        (({"x": X},), {}, r"inputs has no entry for inputs\[0\]"),
    ]
    for inputs, _, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            bundle(*inputs)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"takes float32\[3\] for params\['b'\], and was given bfloat16\[3\]"):
        bundle.fn(PARAMS | {"b": jnp.ones(3, jnp.bfloat16)}, X)
    with pytest.raises(ValueError, match=r"params has no entry for params\['b'\]"):
        bundle.fn({"a": PARAMS["a"]}, X)
    export.save(path, lambda p, x, y: x + y, {}, *[jax.ShapeDtypeStruct(("n", 2), jnp.float32)] * 2, force=True)
    with pytest.raises(ValueError, match=r"takes one size for n, and was given 3 in inputs\[1\], 4 in inputs\[0\]"):
        export.load(path)(X, X[:3])


def test_another_platform(tmp_path: Path):
    export.save(tmp_path / "b", apply, PARAMS, X, platforms=["cuda"])
    bundle = export.load(tmp_path / "b")  # to look at it is fine
    with pytest.raises(ValueError, match=r"was exported for cuda, and is called on cpu. .*platforms=\['cuda', 'cpu'\]"):
        bundle(X)


def test_64_bits(tmp_path: Path):
    with jax.enable_x64(True):
        export.save(tmp_path / "b", lambda params, x: x * params, jnp.float64(2), jnp.ones(3, jnp.float64))
        assert export.load(tmp_path / "b")(jnp.ones(3, jnp.float64)).dtype == jnp.float64
    with pytest.raises(ValueError, match="computes with float64: call jax.config.update"):
        export.load(tmp_path / "b")


def calls_back(x: Any) -> Any:
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def prints(x: Any, ordered: bool = False) -> Any:
    jax.debug.print("{}", x, ordered=ordered)
    return x


def custom(x: Any, **options: Any) -> Any:
    return jax.ffi.ffi_call("my_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype), **options)(x)


FUNCTIONS = {
    "a print": (prints, r"calls back into Python by debug_\w+ \(test_bad_bundles.py:\d+, prints\)"),
    "a print in order": (lambda x: prints(x, True), r"calls back into Python by debug_\w+ \("),
    "a callback inside": (
        lambda x: jax.jit(lambda x: jax.lax.cond(x.sum() > 0, calls_back, lambda x: x, x))(x),
        r"calls back into Python by pure_callback \(test_bad_bundles.py:\d+, calls_back\)",
    ),
    "an effect": (
        lambda x: io_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        "calls back into Python by io_callback",
    ),
    "a custom call": (custom, "makes the custom call my_kernel, and JAX does not promise .* Write that in JAX's own"),
    "with an effect": (lambda x: custom(x, has_side_effect=True), "makes the custom call my_kernel"),
    "a size that is needed": (
        lambda x: x if x.shape[0] > 3 else 2 * x,
        "cannot be exported for every batch: .* Give an axis",
    ),
    "a size for a number": (
        lambda x: x.reshape(len(x), 1, 2),
        r"takes the size of an axis, batch, for an int, .* x.shape\[0\]",
    ),
    "its container": (lambda x: FrozenDict(y=x), "takes or gives what no program in a file does: .*FrozenDict"),
    "an error of its own": (lambda x: 1 / 0, "division"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_cannot_be_saved(name: str, tmp_path: Path):
    fn, message = FUNCTIONS[name]
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        export.save(tmp_path / "b", lambda params, x: fn(x), {}, jax.ShapeDtypeStruct(("batch", 2), jnp.float32))
    assert not list(tmp_path.iterdir())


def test_arguments_that_cannot_be_saved(tmp_path: Path):
    def save(*args: Any, **options: Any) -> None:
        export.save(tmp_path / "b", *args, **options)

    with pytest.raises(ValueError, match=r"params\['k'\] is a PRNG key; store jax.random.key_data"):
        save(lambda p, x: x, {"k": jax.random.key(0)}, X)
    with pytest.raises(ValueError, match="'a/b' of a parameter lies inside another, 'a'"):
        save(lambda p, x: x, {"a": X, "a/b": X}, X)
    for platforms in (["gpu"], "cpu", []):
        with pytest.raises(ValueError, match="platforms is a list of some of cpu, cuda, rocm, tpu; got"):
            save(apply, PARAMS, X, platforms=platforms)
    with pytest.raises(TypeError, match="metrics are finite numbers by name, but 'accuracy' is the string '98%'"):
        save(apply, PARAMS, X, metrics={"accuracy": "98%"})
    with pytest.raises(TypeError, match="metrics are finite numbers by name, but 'loss' is nan"):
        save(apply, PARAMS, X, metrics={"loss": float("nan")})
    with pytest.raises(TypeError, match="was given a dict where Plan belongs"):
        save(apply, PARAMS, X, plan={})
    with pytest.raises(ValueError, match=r"inputs\[0\] has the shape .* whose names of axes cannot be read"):
        save(apply, PARAMS, jax.ShapeDtypeStruct(("batch size", 2), jnp.float32))
    with pytest.raises(TypeError, match="The function comes first, then the parameters"):
        save(PARAMS, apply, X)
    with pytest.raises(TypeError, match="fn is 3, not a function"):
        save(3, PARAMS, X)
    assert not list(tmp_path.iterdir())
    save(apply, PARAMS, X)
    with pytest.raises(FileExistsError, match="force=True replaces it"):
        save(apply, PARAMS, X)
    save(apply, PARAMS, X, force=True)
    with pytest.raises(ValueError, match="is a folder, which is not replaced"):
        export.save(tmp_path, apply, PARAMS, X)


def test_without_flatbuffers(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"need the library flatbuffers: pip install 'jaxprune\[export\]'"):
        export.save(tmp_path / "b", apply, PARAMS, X)
    (tmp_path / "b").write_bytes(whole)
    with pytest.raises(ModuleNotFoundError, match="need the library flatbuffers"):
        export.load(tmp_path / "b")


def test_the_command_says_what_it_is(whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "b").write_bytes(whole)
    assert main(["summarize", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.endswith(
        "b: is a zip, no safetensors file; what export.save wrote is opened by export.load.\n"
    )
