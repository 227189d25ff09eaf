"""A folder of ours opened by transformers: a small Llama of which some projections are integers and the head is tied."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from jaxprune import export, oneshot
from tests.interop.compressed_tensors.test_compressed_tensors import random_codes
from tests.support.llama_models import CONFIGS, TOKENS, cut, logits, make

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own


# Symmetric codes: transformers 5.24 with compressed-tensors 0.20 opens no packed codes of zero, not even of its own files.
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, None), (8, None)])
def test_transformers_opens_it_and_computes_the_same(tmp_path, bits, group_size):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    params, codes = {}, {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight":
            continue
        path, array = name.removesuffix(".weight"), tensor.numpy()
        if "_proj" in name:
            found = random_codes(bits, group_size, True, seed=i, inputs=array.shape[1], outputs=array.shape[0])
            codes[f"{path}/kernel"], array = found, np.asarray(found.values())
            tensor.copy_(torch.from_numpy(array.T.copy()))
        params[f"{path}/kernel" if "_proj" in name else f"{path}/weight"] = array
    export.write_compressed_tensors(
        tmp_path,
        oneshot.Quantized(params, None, codes),
        names=lambda path: path.rpartition("/")[0] + ".weight",
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
    )
    opened, about = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected, found = model(tokens).logits, opened.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_smaller_rounded_model_is_opened(tmp_path):
    config = CONFIGS["smollm2"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    params = cut(make(config), config, drop=1, inner=64, groups=1)
    codes = {}
    for i, (name, layer) in enumerate(params.items()):
        for module in ("q_proj", "up_proj", "down_proj") if name.startswith("layer_") else ():
            inputs, outputs = layer[module]["kernel"].shape
            found = random_codes(4, 32, True, seed=i, inputs=inputs, outputs=outputs)
            codes[f"{name}/{module}/kernel"], layer[module] = found, {"kernel": found.values()}
    export.write_hugging_face(tmp_path, params, config, codes=codes)
    opened, about = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    with torch.no_grad():
        found = opened.eval()(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(found, logits(params, config, TOKENS), atol=1e-4 * np.abs(found).max())
