"""What the classes of Hugging Face's library can express of a Llama, and their `config.json`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune._printing import some
from jaxprune.export._language._llama import ATTENTION, PERCEPTRON, Llama, Sizes, nearest

Config = dict[str, Any]


class Family(NamedTuple):
    """What the models of one `model_type` have.

    Attributes:
        architecture: their class.
        biases: the projections that always have one.
        switches: by a field of the configuration, the projections that have one where it is set.
        head_norms: whether queries and keys are normalised head by head.
        divides: whether the width must be a multiple of the number of heads, whatever the features of a head.
    """

    architecture: str
    biases: frozenset[str] = frozenset()
    switches: Mapping[str, Sequence[str]] = {}
    head_norms: bool = False
    divides: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", switches={"attention_bias": ATTENTION, "mlp_bias": PERCEPTRON}, divides=True),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biases=frozenset({"q_proj", "k_proj", "v_proj"})),
    "qwen3": Family("Qwen3ForCausalLM", switches={"attention_bias": ATTENTION}, head_norms=True),
}
# Fields that are read off the leaves, by the name of the size.
_LAYER_FIELDS = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "inner": "intermediate_size"}
_PER_LAYER = ("layer_types",)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def family_of(config: Mapping[str, Any]) -> Family:
    """Return what the configuration's `model_type` has; raise a ValueError of one that is not known."""
    found = FAMILIES.get(config.get("model_type", ""))
    if found is None:
        raise ValueError(f"model_type is {config.get('model_type')!r}; known are {', '.join(FAMILIES)}")
    return found


def with_head_dim(config: Mapping[str, Any]) -> Config:
    """Return a configuration whose `head_dim` is there: what is computed from widths would change with them.

    Raises:
        ValueError: a size is missing or no whole number, or the class is not known.
    """
    if "quantization_config" in config:
        raise ValueError("the model is quantised (quantization_config); read the one that it was made of")
    family_of(config)
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(f"{field} is {config.get(field)!r}, not a whole number")
    head_dim = config.get("head_dim")
    if head_dim is None:  # 128 is what the class of Qwen3 has where the file says nothing
        head_dim = 128 if config["model_type"] == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim!r}, not an even number")
    return {**config, "head_dim": head_dim}


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Return what a model of a complete configuration is made of."""
    family, layers = family_of(config), config["num_hidden_layers"]
    switched = (name for field, names in family.switches.items() if config.get(field) for name in names)
    return Sizes(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        head_dim=config["head_dim"],
        heads=(config["num_attention_heads"],) * layers,
        kv_heads=(config.get("num_key_value_heads") or config["num_attention_heads"],) * layers,
        inner=(config["intermediate_size"],) * layers,
        tied=bool(config.get("tie_word_embeddings", False)),
        biases=family.biases.union(switched),
        head_norms=family.head_norms,
    )


def fitted(config: Mapping[str, Any], model: Llama) -> Config:
    """Return the configuration with the sizes of a model.

    Raises:
        ValueError: its class cannot express it.
    """
    sizes = model.sizes
    family = family_like(config, sizes)
    found = {**config, "architectures": [family.architecture], "head_dim": sizes.head_dim}
    found |= {"vocab_size": sizes.vocabulary, "hidden_size": sizes.width, "num_hidden_layers": len(sizes.heads)}
    for size, field in _LAYER_FIELDS.items():
        found[field] = one_for_all(getattr(sizes, size), field, family.architecture)
    found["tie_word_embeddings"] = sizes.tied
    found |= _biases(sizes, family)
    if family.divides and sizes.width % sizes.heads[0]:
        raise ValueError(_refuses_heads(sizes, family))
    _check_tokens(config, sizes.vocabulary)
    found.pop("torch_dtype", None)
    return found | _of_layers(config, model) | {"dtype": str(model.dtype)}


def require_family(config: Mapping[str, Any]) -> Family:
    """Return what the `model_type` of an argument `config` has."""
    try:
        return family_of(config)
    except ValueError as error:
        raise ValueError(f"config: {error}.") from None


def family_like(config: Mapping[str, Any], sizes: Sizes) -> Family:
    """Return what a configuration's `model_type` has; raise a ValueError where norms of heads say that it is another one."""
    family = require_family(config)
    if sizes.head_norms != family.head_norms:
        has, lacks = ("q_norm and k_norm", "none") if sizes.head_norms else ("no q_norm and k_norm", "them")
        raise ValueError(f"params has {has}; {family.architecture} has {lacks}. Is config['model_type'] right?")
    return family


def one_for_all(numbers: Sequence[int], field: str, owner: str) -> int:
    """Return the number that all layers have; raise a ValueError where they differ, which `owner` cannot express."""
    if len(set(numbers)) > 1:
        first = next(i for i, number in enumerate(numbers) if number != numbers[0])
        raise ValueError(
            f"layer 0 has {field} {numbers[0]} and layer {first} {numbers[first]}, counted anew; {owner} has one for all "
            f"layers. Nearest are {min(numbers)}, cut from every layer, or {max(numbers)}, where fewer were cut; "
            "write_gguf writes each layer's own."
        )
    return numbers[0]


def _biases(sizes: Sizes, family: Family) -> Config:
    """The switches of biases; raise a ValueError where biases are there, or missing, that no switch is for."""
    switches = {field: bool(sizes.biases & set(names)) for field, names in family.switches.items()}
    expected = family.biases.union(*(family.switches[field] for field, on in switches.items() if on))
    extra, missing = sorted(sizes.biases - expected), sorted(expected - sizes.biases)
    if extra:
        raise ValueError(
            f"params has biases in {some(extra)}, which {family.architecture} has not"
            + (f"; it has them in {some(sorted(expected))}." if expected else " anywhere.")
            + " LlamaForCausalLM can have them, in all of attention and in all of the perceptron."
        )
    if missing:
        raise ValueError(
            f"params has no biases in {some(missing)}; {family.architecture} has them in all of {some(sorted(expected))}. "
            "Put zeros there."
        )
    return switches


def _refuses_heads(sizes: Sizes, family: Family) -> str:
    heads, kv_heads = sizes.heads[0], sizes.kv_heads[0]
    fits: Callable[[int], bool] = lambda n: sizes.width % n == 0 and n % kv_heads == 0  # noqa: E731
    found = nearest(heads, fits)
    numbers = (
        f"Nearest are {some(map(str, found))} heads" if found else f"With {kv_heads} of keys and values no number fits"
    )
    return (
        f"params has {heads} heads; {family.architecture} refuses a hidden_size ({sizes.width}) that is no multiple of them. "
        f"{numbers}; or, as the same function, MistralForCausalLM: config | "
        '{"model_type": "mistral", "sliding_window": None}, if there are no biases.'
    )


def _of_layers(config: Mapping[str, Any], model: Llama) -> Config:
    """What the configuration says of single layers, for those that are left."""
    count, before = len(model.sizes.heads), config.get("num_hidden_layers")
    numbers = tuple(range(count)) if model.numbers is None and count == before else model.numbers

    def kept(field: str, of_layers: Sequence[Any]) -> list[Any]:
        if numbers is None:
            if len(set(of_layers)) > 1:
                raise ValueError(
                    f"config says with {field} how layers differ, and {count} stacked layers do not say which of {len(of_layers)} they "
                    "are. Name them layer_0, layer_2, ... by their places, or set it."
                )
            return list(of_layers[:1]) * count
        if numbers[-1] >= len(of_layers):
            raise ValueError(f"config has {field} for {len(of_layers)} layers, and params a layer_{numbers[-1]}.")
        return [of_layers[number] for number in numbers]

    found: Config = {field: kept(field, config[field]) for field in _PER_LAYER if config.get(field) is not None}
    first = config.get("max_window_layers")  # so many layers from the first see everything
    if first is not None and config.get("use_sliding_window"):
        whole = [number < first for number in range(max(before or 0, 1 + max(numbers or [0])))]
        found["max_window_layers"] = sum(kept("max_window_layers", whole))
    return found


def _check_tokens(config: Mapping[str, Any], vocabulary: int) -> None:
    """Raise a ValueError where the configuration names a token that was cut."""
    for field in _TOKENS:
        tokens = config.get(field)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if isinstance(token, int) and token >= vocabulary:
                raise ValueError(f"config[{field!r}] is {token}, and params has {vocabulary} tokens. Set it, or None.")
