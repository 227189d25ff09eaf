"""Trees in the names and layouts of MaxText: by hand, there and back, with the fields that build the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import export
from tests.support.llama_models import CONFIGS, cut, make, stack

NAMES = [name for name in CONFIGS if name != "llama with biases"]  # which its block has not
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
ROTATED = CONFIGS["llama"] | {"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}}


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


def oracle(params, config) -> dict[str, np.ndarray]:
    """What a model of single layers holds, entry for entry."""
    params = jax.tree.map(np.asarray, params)
    dim, kind = config["head_dim"], config["model_type"]
    found = {"params/token_embedder/embedding": params["embed"]["embedding"], "params/decoder/decoder_norm/scale": params["norm"]["scale"]}  # fmt: skip
    if "head" in params:
        found["params/decoder/logits_dense/kernel"] = params["head"]["kernel"]
    layers = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name[6:]))
    order = list(range(dim))
    if "rope_parameters" in config:  # of Llama 3.1: 0, dim / 2, 1, dim / 2 + 1, ...
        order = [half * dim // 2 + i for i in range(dim // 2) for half in (0, 1)]
    for i, name in enumerate(layers):
        of, within = params[name], f"params/decoder/layers_{i}"
        found[f"{within}/pre_self_attention_layer_norm/scale"] = of["attention_norm"]["scale"]
        found[f"{within}/post_self_attention_layer_norm/scale"] = of["mlp_norm"]["scale"]
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            for leaf, array in of[f"{ours}_proj"].items():
                heads = [array[..., h * dim : (h + 1) * dim] for h in range(array.shape[-1] // dim)]
                heads = [head[..., order] for head in heads] if ours != "v" else heads
                if ours == "q" and kind in ("llama", "mistral"):
                    heads = [head / np.float32(dim**0.5) for head in heads]
                found[f"{within}/self_attention/{theirs}/{leaf}"] = np.stack(heads, axis=-2)
        out = of["o_proj"]["kernel"]
        found[f"{within}/self_attention/out/kernel"] = np.stack([out[h * dim : (h + 1) * dim] for h in range(len(out) // dim)])  # fmt: skip
        for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            found[f"{within}/mlp/{theirs}/kernel"] = of[f"{ours}_proj"]["kernel"]
        for ours, theirs in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            if ours in of:
                found[f"{within}/self_attention/{theirs}/scale"] = of[ours]["scale"]
    return found


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", [*NAMES, "rotated"])
def test_a_tree_has_their_names_and_layouts_and_comes_back(name):
    config = CONFIGS.get(name, ROTATED)
    smaller = cut(make(config), config, drop=1, inner=12, groups=1)
    expected = oracle(smaller, config)
    tree, overrides = export.to_maxtext(smaller, config, scan_layers=False)
    assert_close(flat(tree), expected)
    scanned, stacked_overrides = export.to_maxtext(smaller, config)
    outside = {path: array for path, array in expected.items() if "layers_" not in path}
    inside = {path.replace("layers_0", "layers"): path for path in expected if "layers_0" in path}
    inside = {ours: np.stack([expected[path], expected[path.replace("layers_0", "layers_1")]], 1) for ours, path in inside.items()}  # fmt: skip
    assert_close(flat(scanned), outside | inside)
    assert stacked_overrides == overrides | {"scan_layers": True}
    assert_close(flat(export.to_maxtext(stack(smaller), config)[0]), outside | inside)
    renumbered = {name: leaf for name, leaf in smaller.items() if name != "layer_2"} | {"layer_1": smaller["layer_2"]}
    for found in (tree, scanned, scanned["params"], {"params": scanned}):
        assert_close(flat(export.from_maxtext(found, config)), flat(renumbered))


def test_heads_and_layers_are_axes():
    config = CONFIGS["qwen2"]
    tree, _ = export.to_maxtext(make(config), config)
    attention, mlp = (tree["params"]["decoder"]["layers"][name] for name in ("self_attention", "mlp"))
    assert {name: leaf["kernel"].shape for name, leaf in attention.items()} == {"query": (16, 3, 4, 4), "key": (16, 3, 2, 4), "value": (16, 3, 2, 4), "out": (4, 3, 4, 16)}  # fmt: skip
    assert {name: leaf["bias"].shape for name, leaf in attention.items() if "bias" in leaf} == {"query": (4, 3, 4), "key": (2, 3, 4), "value": (2, 3, 4)}  # fmt: skip
    assert {name: leaf["kernel"].shape for name, leaf in mlp.items()} == {"wi_0": (16, 3, 20), "wi_1": (16, 3, 20), "wo": (20, 3, 16)}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_overrides_build_the_smaller_model(name):
    config = CONFIGS[name]
    smaller = cut(make(config), config, drop=1, inner=12, groups=1)
    _, overrides = export.to_maxtext(smaller, config)
    block = {"smollm2": "llama2", "llama": "llama2"}.get(name, name)
    assert overrides == {
        "decoder_block": block, "base_emb_dim": 16, "base_num_query_heads": 2, "base_num_kv_heads": 1, "base_mlp_dim": 12,
        "base_num_decoder_layers": 2, "head_dim": config["head_dim"], "vocab_size": 24, "mlp_activations": ["silu", "linear"],
        "enable_dropout": False, "normalization_layer_epsilon": 1e-5, "logits_via_embedding": name in ("smollm2", "qwen3"),
        "normalize_embedding_logits": False, "attention_bias": name == "qwen2", "use_qk_norm": name == "qwen3",
        "rope_type": "default", "rope_max_timescale": 100, "scan_layers": True, "param_scan_axis": 1,
    }  # fmt: skip


def test_rotations_that_it_knows_and_that_it_does_not():
    params = make(CONFIGS["llama"])
    of = lambda config: export.to_maxtext(params, config)[1]  # noqa: E731
    assert {name: of(ROTATED)[name] for name in ("rope_type", "rope_use_scale", "rope_max_timescale")} == {"rope_type": "llama3.1", "rope_use_scale": True, "rope_max_timescale": 500_000}  # fmt: skip
    linear = of(CONFIGS["llama"] | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (linear["rope_type"], linear["rope_linear_scaling_factor"]) == ("default", 4.0)
    with pytest.raises(ValueError, match=r"scaled by \{.*'factor': 32.0.*MaxText knows those of llama3 with"):
        of(CONFIGS["llama"] | {"rope_scaling": LLAMA3 | {"factor": 32.0}})
    with pytest.raises(ValueError, match="the base 100.5 of rotations; MaxText takes a whole number"):
        of(CONFIGS["llama"] | {"rope_theta": 100.5})


def test_narrow_dtypes_stay_and_queries_come_back_to_the_last_bit_or_two():
    config = CONFIGS["mistral"]  # six features: no root of a power of two
    params = make(config, dtype=jnp.bfloat16)
    tree, _ = export.to_maxtext(params, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    back = export.from_maxtext(tree, config)
    for path, leaf in flat(params).items():
        if "q_proj" in path:
            np.testing.assert_allclose(flat(back)[path].astype(np.float32), leaf.astype(np.float32), rtol=2**-7)
        else:
            np.testing.assert_array_equal(flat(back)[path], leaf)


def test_what_its_blocks_cannot_express_is_refused():
    config = CONFIGS["llama"]
    params = make(config)
    own = cut(params, config, drop=1, inner=12, groups=1) | {"layer_2": params["layer_2"]}
    with pytest.raises(ValueError, match="layer 0 has num_attention_heads 2 and layer 1 4, counted anew; MaxText has one for all"):  # fmt: skip
        export.to_maxtext(own, config)
    biased = CONFIGS["llama with biases"]
    with pytest.raises(ValueError, match="biases in down_proj, gate_proj, .*; MaxText's block for a llama has them in nothing"):  # fmt: skip
        export.to_maxtext(make(biased), biased)
    for call in (export.to_maxtext, export.from_maxtext):
        with pytest.raises(ValueError, match="config: model_type is 'gpt2'"):
            call(params, config | {"model_type": "gpt2"})
        with pytest.raises(ValueError, match="sliding window, which MaxText of this type has not"):
            call(params, config | {"model_type": "mistral", "sliding_window": 4})


def test_a_tree_of_another_model_is_refused():
    config = CONFIGS["llama"]
    tree = export.to_maxtext(make(config), config, scan_layers=False)[0]["params"]
    with pytest.raises(ValueError, match=r"tree\['moe'\]\['kernel'\] has no place in a model of the type of Llama"):
        export.from_maxtext(tree | {"moe": {"kernel": jnp.ones((2, 2))}}, config)
    for wrong in (2, 8):
        with pytest.raises(ValueError, match=rf"has heads of 4 features, config\['head_dim'\] is {wrong}"):
            export.from_maxtext(tree, config | {"head_dim": wrong})
    attention = tree["decoder"]["layers_0"]["self_attention"]
    attention["out"] = {"kernel": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match=r"\['out'\]\['kernel'\] has shape \(16, 16\); it should have 3 axes"):
        export.from_maxtext(tree, config)
    del attention["out"]
    with pytest.raises(ValueError, match="params has no layer_0/o_proj/kernel"):
        export.from_maxtext(tree, config)
