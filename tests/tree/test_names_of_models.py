"""Names and shapes of real models: what is a kernel by default, and along which axis its inputs lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune
from jaxprune import is_kernel, rules
from jaxprune._tree._axes import conventional

# Kernels: name, shape, axis of the inputs, axes of the outputs; None where neither name nor shape tells.
KERNELS = [
    # ResNet, ConvNeXt, Swin, in PyTorch
    ("conv1.weight", (64, 3, 7, 7), 1, (0,)),
    ("layer1.0.downsample.0.weight", (256, 64, 1, 1), 1, (0,)),
    ("fc.weight", (1000, 2048), 1, (0,)),
    ("head.weight", (1, 2048), 1, (0,)),
    ("stages.0.downsample.1.weight", (192, 96, 2, 2), 1, (0,)),
    ("convnext.embeddings.patch_embeddings.weight", (96, 3, 4, 4), 1, (0,)),
    ("convnext.encoder.stages.0.layers.0.dwconv.weight", (96, 1, 7, 7), 1, (0,)),
    ("convnext.encoder.stages.0.layers.0.pwconv1.weight", (384, 96), 1, (0,)),
    ("layers.0.blocks.0.attn.qkv.weight", (288, 96), 1, (0,)),
    ("layers.0.downsample.reduction.weight", (192, 384), 1, (0,)),
    # ViT, CLIP, SAM, DETR, DiT
    ("patch_embed.proj.weight", (768, 3, 16, 16), 1, (0,)),
    ("patch_embed/proj/weight", (768, 3, 16, 16), 1, (0,)),
    ("vit.embeddings.patch_embeddings.projection.weight", (768, 3, 16, 16), 1, (0,)),
    ("vision_model.embeddings.patch_embedding.weight", (768, 3, 32, 32), 1, (0,)),
    ("vision_model.embeddings.patch_embedding.weight", (768, 768), 1, (0,)),
    ("visual.patch_embed.proj.weight", (1280, 3, 2, 14, 14), 1, (0,)),
    ("visual.transformer.resblocks.0.attn.in_proj_weight", (2304, 768), 1, (0,)),
    ("visual.transformer.resblocks.0.mlp.c_fc.weight", (3072, 768), 1, (0,)),
    ("visual.transformer.resblocks.0.mlp.c_proj.weight", (768, 3072), 1, (0,)),
    ("visual.proj", (768, 512), 0, (1,)),
    ("text_projection", (512, 512), 0, (1,)),
    ("visual_projection.weight", (512, 768), 1, (0,)),
    ("image_encoder.neck.0.weight", (256, 768, 1, 1), 1, (0,)),
    ("mask_decoder.output_upscaling.0.weight", (256, 64, 2, 2), None, None),
    ("model.input_projection.weight", (256, 2048, 1, 1), 1, (0,)),
    ("t_embedder.mlp.0.weight", (1152, 256), 1, (0,)),
    ("x_embedder.proj.weight", (1152, 4, 2, 2), 1, (0,)),
    # Llama, Mixtral, GPT-2 (whose files keep the inputs first), nanoGPT, BERT, ALBERT, T5
    ("model.layers.0.self_attn.q_proj.weight", (4096, 4096), 1, (0,)),
    ("model.layers.11.mlp.down_proj.weight", (4096, 11008), 1, (0,)),
    ("model.layers.0.block_sparse_moe.experts.7.w1.weight", (14336, 4096), 1, (0,)),
    ("lm_head.weight", (32000, 4096), 1, (0,)),
    ("h.0.attn.c_attn.weight", (768, 2304), 0, (1,)),
    ("transformer.h.0.mlp.c_fc.weight", (768, 3072), 0, (1,)),
    ("transformer.h.0.mlp.c_proj.weight", (3072, 768), 0, (1,)),
    ("transformer.h.0.attn.c_proj.weight", (768, 768), None, None),
    ("transformer.h.0.attn.c_attn.weight", (2304, 768), 1, (0,)),
    ("bert.encoder.layer.0.attention.self.query.weight", (768, 768), 1, (0,)),
    ("bert.encoder.layer.0.attention.output.dense.weight", (768, 768), 1, (0,)),
    ("cls.predictions.transform.dense.weight", (768, 768), 1, (0,)),
    ("cls.seq_relationship.weight", (2, 768), 1, (0,)),
    ("albert.encoder.embedding_hidden_mapping_in.weight", (768, 128), 1, (0,)),
    ("electra.embeddings_project.weight", (256, 128), 1, (0,)),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", (512, 512), 1, (0,)),
    ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", (1024, 512), 1, (0,)),
    # Whisper, wav2vec2, Mamba, diffusion, GAN vocoders
    ("model.encoder.conv1.weight", (384, 80, 3), 1, (0,)),
    ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", (512, 1, 10), 1, (0,)),
    ("wav2vec2.encoder.pos_conv_embed.conv.weight_v", (768, 48, 128), 1, (0,)),
    ("pos_conv_embed/conv/weight_v", (768, 48, 128), 1, (0,)),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", (768, 48, 128), 1, (0,)),
    ("quantizer.weight_proj.weight", (640, 512), 1, (0,)),
    ("encoder.layers.0.self_attn.linear_pos.weight", (512, 512), 1, (0,)),
    ("backbone.layers.0.mixer.conv1d.weight", (1536, 1, 4), 1, (0,)),
    ("backbone.layers.0.mixer.x_proj.weight", (80, 1536), 1, (0,)),
    ("time_embedding.linear_1.weight", (1280, 320), 1, (0,)),
    ("down_blocks.0.resnets.0.conv1.weight", (320, 320, 3, 3), 1, (0,)),
    ("ups.0.weight_v", (512, 256, 16), None, None),
    ("decoder.block.1.conv_t1.weight_v", (768, 384, 16), None, None),
    ("neck.reassemble_stage.layers.0.resize.weight", (96, 96, 4, 4), None, None),
    ("up1.up.weight", (1024, 512, 2, 2), None, None),
    ("down_blocks.0.upsamplers.0.conv.weight", (320, 320, 3, 3), 1, (0,)),
    ("model.layers.0.mlp.up_proj.weight", (11008, 4096), 1, (0,)),
    ("features.1.0.block.1.fc1.weight", (8, 32, 1, 1), 1, (0,)),
    ("transformer.blocks.0.attn.Wqkv.weight", (12288, 4096), 1, (0,)),
    ("esm.contact_head.regression.weight", (1, 660), 1, (0,)),
    ("model.layers.0.mlp.experts.gate_up_proj", (32, 2880, 5760), None, None),
    ("text_embedder.layers.0.attn.query.weight", (64, 64), 1, (0,)),
    ("e.f.b.0.weight", (64, 32), 1, (0,)),
    ("lstm.weight_hh_l0_reverse", (64, 16), 1, (0,)),
    # Equinox
    ("layers/0/weight", (16, 8), 1, (0,)),
    ("conv/weight", (16, 8, 3), 1, (0,)),
    ("conv_transpose/weight", (16, 8, 3, 3), None, None),
    ("cell/weight_ih", (12, 3), 1, (0,)),
    ("stack/weight", (3, 8, 8), None, None),  # layers that vmap made, if stacked= does not say so
    # Linen, NNX
    ("Conv_0/kernel", (3, 3, 8, 16), 2, (3,)),
    ("Conv_0/kernel", (5, 8, 16), 1, (2,)),
    ("embedding/kernel", (16, 16, 3, 768), 2, (3,)),
    ("ConvTranspose_0/kernel", (2, 2, 8, 16), None, None),
    ("up/kernel", (2, 2, 8, 16), None, None),
    ("Dense_0/kernel", (8, 1), 0, (1,)),
    ("DenseGeneral_0/kernel", (8, 3, 4), None, None),
    ("heads/kernel", (8, 3, 4), None, None),
    ("DenseGeneral_0/kernel", (2, 4, 3, 4), None, None),
    ("Einsum_0/kernel", (16, 8), None, None),
    ("layer_0/attn/q_einsum/w", (8, 64, 16), None, None),
    ("layer_0/mlp/gating_einsum", (2, 64, 256), None, None),
    ("attention/query/kernel", (64, 4, 16), 0, (1, 2)),
    ("attention/out/kernel", (4, 16, 64), 1, (2,)),
    ("encoder/layer/0/attention/self/query/kernel", (768, 768), 0, (1,)),
    ("decoder/logits_dense/kernel", (768, 32128), 0, (1,)),
    # Haiku
    ("res_net50/~/initial_conv/w", (7, 7, 3, 64), 2, (3,)),
    ("conv2_d_transpose/w", (4, 4, 16, 8), 3, (2,)),
    ("conv1_d_transpose/w", (4, 16, 8), 2, (1,)),
    ("transformer/linear/w", (64, 64), 0, (1,)),
    ("gru/w_h", (64, 192), 0, (1,)),
    ("evoformer/attention//weights", (256, 128), 0, (1,)),
    # Keras
    ("conv2d_3/kernel", (3, 3, 8, 16), 2, (3,)),
    ("conv2d_transpose/kernel", (3, 3, 16, 8), None, None),
    ("multi_head_attention/attention_output/kernel", (4, 16, 64), 1, (2,)),
    ("multi_head_attention/query/kernel", (64, 4, 16), 0, (1, 2)),
    ("lstm/lstm_cell/recurrent_kernel", (64, 256), 0, (1,)),
    ("einsum_dense/kernel", (64, 64), None, None),
    # Names of one's own
    ("weights", (8, 16), 0, (1,)),
    ("weight_matrix", (8, 16), 0, (1,)),
    ("blocks/0/w1", (8, 16), 0, (1,)),
    ("filters", (3, 3, 4, 8), 2, (3,)),
    ("filters", (8, 4, 3, 3), 1, (0,)),
    ("filters", (3, 3, 3, 3), None, None),
    ("deconv", (3, 3, 4, 8), None, None),
    ("wq", (8, 2, 4), None, None),
]

# Leaves of two axes and more that are none.
OTHERS = [
    ("model.embed_tokens.weight", (32000, 4096)),
    ("tok_embeddings.weight", (32000, 4096)),
    ("transformer.wte.weight", (50257, 768)),
    ("transformer.wpe.weight", (1024, 768)),
    ("bert.embeddings.word_embeddings.weight", (30522, 768)),
    ("bert.embeddings.token_type_embeddings.weight", (2, 768)),
    ("shared.weight", (32128, 512)),
    ("model.shared.weight", (50265, 768)),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8)),
    ("model.decoder.embed_positions.weight", (448, 384)),
    ("text_model.embeddings.position_embedding.weight", (77, 512)),
    ("query_position_embeddings.weight", (100, 256)),
    ("mask_decoder.iou_token.weight", (1, 256)),
    ("mask_decoder.mask_tokens.weight", (4, 256)),
    ("y_embedder.embedding_table.weight", (1001, 1152)),
    ("image_encoder.pos_embed", (1, 64, 64, 768)),
    ("image_encoder.blocks.0.attn.rel_pos_h", (27, 64)),
    ("layers.0.blocks.0.attn.relative_position_bias_table", (169, 3)),
    ("vit.embeddings.cls_token", (1, 1, 768)),
    ("qformer.query_tokens", (1, 32, 768)),
    ("perceiver.latents", (256, 1280)),
    ("quantizer.codevectors", (1, 640, 128)),
    ("quantizer.codebook.weight", (1024, 256)),
    ("wav2vec2.encoder.pos_conv_embed.conv.weight_g", (1, 1, 128)),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", (1, 1, 128)),
    ("linear.parametrizations.weight.original0", (64, 1)),
    ("encoder.layers.0.self_attn.pos_bias_u", (8, 64)),
    ("convnextv2.encoder.stages.0.layers.0.grn.weight", (1, 1, 1, 384)),
    ("backbone.layers.0.mixer.A_log", (1536, 16)),
    ("rotary_emb.cos_cached", (2048, 128)),
    ("conv.weight_g", (64, 1, 1, 1)),
    ("map_head/probe", (1, 1, 64)),
    ("probe", (1, 1, 64)),
    ("p_re_lu/alpha", (1, 1, 32)),
    ("p_re_lu/alpha", (28, 28, 32)),
    ("vector_u", (1, 64)),
    ("rope/rotations", (128, 32)),
    ("batch_norm/~/mean_ema/average", (1, 1, 1, 64)),
    ("Embed_0/embedding", (1000, 64)),
    ("token_embedder/embedding", (1000, 64)),
    ("relative_attention_bias/embedding", (32, 8)),
    ("embed/embeddings", (1000, 64)),
    ("embedding_3/embeddings", (1000, 64)),
    ("encoder/posembed_input/pos_embedding", (1, 196, 768)),
    ("self_attention/query/bias", (4, 16)),
    ("Dense_0/bias", (1, 64)),
    ("norms/0/weight", (4, 5)),
    ("row", (1, 64)),
    ("embeddings.words.weight", (1000, 64)),
    ("q_proj.lora_A.weight", (8, 64)),
    ("encode_positions.pe", (1, 600, 768)),
    ("synthesis.b4.const", (1, 512, 4, 4)),
    ("embeddings.position_embeddings.weights.0", (512, 1, 64)),
    ("transformer_module.queries_features.weight", (100, 256)),
    ("model.layers.0.self_attn.q_proj.lora_A.default.weight", (8, 4096)),
    ("model.layers.0.mlp.down_proj.scales", (86, 4096)),
    ("model.layers.0.mlp.down_proj.weight_scale", (4096, 2)),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", (32, 5760)),
    ("emb_rel_k", (1, 9, 96)),
]


def of(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(("path", "shape", "inputs", "outputs"), KERNELS)
def test_kernels(path, shape, inputs, outputs):
    assert is_kernel(path, of(shape))
    axes = conventional(path, shape)
    found = None if axes.inputs is None else axes.inputs % len(shape)
    assert (found, axes.outputs) == (inputs, outputs)
    assert bool(axes.why) == (inputs is None)


@pytest.mark.parametrize(("path", "shape"), OTHERS)
def test_others(path, shape):
    assert not is_kernel(path, of(shape))


@pytest.mark.parametrize("path", sorted({path for path, *_ in KERNELS} | {path for path, _ in OTHERS}))
def test_dots_are_slashes(path):
    shapes = [shape for other, shape, *_ in [*KERNELS, *OTHERS] if other == path]
    for shape in shapes:
        other = path.replace(".", "/")
        assert is_kernel(path, of(shape)) == is_kernel(other, of(shape))
        assert conventional(path, shape) == conventional(other, shape)


WORDS = st.sampled_from(
    [
        "kernel",
        "w",
        "weight",
        "weights",
        "weight_v",
        "bias",
        "embed",
        "conv",
        "Conv_0",
        "ConvTranspose_0",
        "up",
        "query",
        "out",
        "einsum",
        "norm",
        "parametrizations",
        "original1",
        "0",
        "7",
        "c_attn",
    ]
)


@given(
    st.lists(st.one_of(WORDS, st.text(max_size=4)), max_size=4),
    st.sampled_from("/."),
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.integers(0, 2),
)
def test_any_name_gets_a_verdict_and_known_axes_or_a_reason(parts, separator, shape, layers):
    path, stack = separator.join(parts), tuple(range(min(layers, len(shape))))
    assert is_kernel(path, of(shape)) in (True, False)
    assert not is_kernel(path, of(shape[:1]))
    axes = conventional(path, shape, stack)
    own = [axis for axis in range(len(shape)) if axis not in stack]
    if axes.inputs is None:
        assert axes.why
    else:
        assert not axes.why
        assert axes.inputs in own
        assert set(axes.outputs) <= set(own) - {axes.inputs}
        assert list(axes.outputs) == sorted(axes.outputs)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_a_file_with_dots_in_its_names_is_pruned_along_its_inputs():
    w = normal(8, 12)
    dotted = {"model.layers.0.self_attn.q_proj.weight": w, "model.norm.weight": jnp.ones(8), "lm_head.weight": w}
    masks = jaxprune.make_masks(dotted, 1, rule=rules.n_m(4), prunable="model.layers")
    found = np.asarray(masks["model.layers.0.self_attn.q_proj.weight"])
    assert (found.reshape(8, 3, 4).sum(2) == 1).all()
    assert masks["lm_head.weight"].all()
    nested = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"weight": w}}}}}}
    np.testing.assert_array_equal(found, jax.tree.leaves(jaxprune.make_masks(nested, 1, rule=rules.n_m(4)))[0])
    # Patterns with dots or slashes, prefixes of k, stacks; what is printed stays as it was written.
    rows = jaxprune.make_masks(dotted, {"model": 0.5, "lm_head": 0.0}, rule=rules.row_sparsity)
    assert (np.asarray(rows["model.layers.0.self_attn.q_proj.weight"]).sum(1) == 6).all()
    assert rows["lm_head.weight"].all()
    for pattern in ("model/layers/*", "*.q_proj", "*q_proj.weight"):
        table = jaxprune.summarize(dotted, masks, prunable=pattern)
        assert [row.path for row in table.rows if row.prunable] == ["model.layers.0.self_attn.q_proj.weight"]
    stack = {"blocks.dense.kernel": normal(3, 4, 8)}
    masks = jaxprune.make_masks(stack, 2, rule=rules.n_m(4), stacked="blocks.dense")
    assert (np.asarray(masks["blocks.dense.kernel"]).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("rule", "k"),
    [(rules.n_m(4), 2), (rules.row_sparsity, 0.5), (rules.channels(rules.layer_sparsity), 0.5)],
    ids=str,
)
def test_rules_that_need_an_axis_ask_for_it_where_names_do_not_tell(rule, k):
    params = {"up": {"ConvTranspose_0": {"kernel": normal(2, 2, 4, 8)}}}
    with pytest.raises(ValueError, match=r"params\['up'\]\['ConvTranspose_0'\]\['kernel'\] of shape .* sites=.*axis="):
        jaxprune.make_masks(params, k, rule=rule)
    # The rules that look at the whole layer need none.
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    assert jaxprune.summarize(params, masks).rows[0].dead_units == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_sites_know_which_way_a_transposed_kernel_lies(transposed):
    dimensions = ("NHWC", "HWIO", "NHWC")

    def fn(params, x):
        return jax.lax.conv_transpose(
            x,
            params["ConvTranspose_0/kernel"],
            (2, 2),
            "SAME",
            dimension_numbers=dimensions,
            transpose_kernel=transposed,
        )

    params = {"ConvTranspose_0/kernel": normal(2, 2, 8, 4) if transposed else normal(2, 2, 4, 8)}
    sites = jaxprune.find_sites(fn, params, jnp.ones((1, 3, 3, 4)))
    mask = np.asarray(jax.tree.leaves(jaxprune.make_masks(params, 2, rule=rules.n_m(4), sites=sites))[0])
    assert (mask.sum(3 if transposed else 2) == 2).all()
