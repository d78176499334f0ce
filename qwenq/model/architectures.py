"""The architectures that can be quantized, one entry a family: names, biases and the stages of a decoder layer.

A decoder layer is a sequence of blocks, each `h = h + last(block(norm(h)))`: attention, then the feed-forward network.
A `Stage` is a set of linears that read the same input; stages run one after the other. The block solver, channel
scales, sensitivities, tensor-parallel cuts, the dry run, budgets and reports read them: nothing else in this package
knows how many there are or what they are called.

A mixture of experts would be an entry and one more kind of stage: linears named once an expert
(`mlp.experts.{}.gate_proj`, the router beside them kept in 16 bit), `ModelSpec.layer_linears` writing them out, and a
Hessian an expert in the block solver, over the tokens that the router sends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwenq.errors import CheckpointError
from qwenq.io.json import shown


@dataclass(frozen=True)
class Linear:
    """One linear of a stage.

    `outputs` name sizes of ModelSpec whose sum is its number of rows: one, or several where projections are merged.
    `bias`: always there (True), never (False), or when this key of config.json is true.
    """

    path: str  # within the layer: mlp.down_proj
    outputs: tuple[str, ...]
    bias: bool | str = False

    @property
    def kind(self) -> str:
        """`q_proj`, `down_proj`, ..."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Stage:
    """Linears that read the same input: engines fuse them, so they share bits, group size and Hessian.

    A stage with a `norm` is the first of its block and reads what the norm makes of the hidden states; others read what
    the block makes of the outputs of the stages before. A stage that `adds` is the last of its block: the outputs of
    its one linear are added to the hidden states.
    """

    name: str  # as recipes, sensitivity tables and dry runs call it
    linears: tuple[Linear, ...]
    inputs: str  # size of ModelSpec: columns of every linear
    norm: str = ""  # module before it, within the layer: input_layernorm
    adds: bool = False
    cut: str = "column"  # by tensor parallelism: "column" shares out the outputs, "row" the inputs
    folds_into: str = ""  # norm or linear (in a block without attention) that takes channel scales of the inputs
    fused: str = ""  # path under which engines look up several linears as one: self_attn.qkv_proj

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears' names within the layer."""
        return tuple(linear.path for linear in self.linears)

    @property
    def block(self) -> str:
        """The module its linears are in: self_attn, mlp."""
        return self.linears[0].path.rpartition(".")[0]

    @property
    def scaled(self) -> tuple[str, ...]:
        """Linears whose weights change when channel scales are folded; none where none are."""
        if not self.folds_into:
            return ()
        return self.paths if self.folds_into == self.norm else (self.folds_into, *self.paths)


@dataclass(frozen=True)
class SlidingWindow:
    """Sliding-window attention in config.json: the window's key, and the key that switches it on."""

    key: str = "sliding_window"
    switch: str = "use_sliding_window"  # a key that has to be true; empty where the window alone decides
    default: int | None = 4096  # what transformers takes where the key is missing

    def refuse(self, config: Mapping[str, Any], context: int, where: str) -> None:
        """CheckpointError where the window is shorter than the `context` tokens a model reads; null is no window."""
        window = config.get(self.key, self.default)
        kinds = config.get("layer_types")
        for kind in kinds if isinstance(kinds, list) else ():
            long = kind == "sliding_attention" and isinstance(window, int) and window >= context
            if kind != "full_attention" and not long:
                raise CheckpointError(
                    f"{where}: layer_types has {shown(repr(kind), 40)}, wanted only full_attention",
                    hint="use a version of the model with full attention in every layer",
                )
        off = window is None or (self.switch and not config.get(self.switch))
        if off or (isinstance(window, int) and window >= context):
            return
        raise CheckpointError(
            f"{where}: {self.switch or self.key} with a window of {shown(str(window), 40)} tokens is not "
            f"supported, the model reads {context}",
            hint=f"set {self.switch} to false (as all published Qwen2.5 models have it)"
            if self.switch
            else "sliding-window attention is not supported: use a version of the model without it",
        )


@dataclass(frozen=True)
class GGUFNames:
    """The family in llama.cpp's files: `general.architecture`, and the names that modules have there.

    `paired`: projections whose rows lie there as rotation by neighbouring pairs wants them, not by halves of a head.
    `unbiased`: linears whose bias llama.cpp has no place for, where the family may have one: it refuses such a file.
    """

    architecture: str
    modules: Mapping[str, str]  # within the layer: self_attn.q_proj -> attn_q
    paired: tuple[str, ...] = ()
    unbiased: tuple[str, ...] = ()
    embedding: str = "token_embd"
    norm: str = "output_norm"
    head: str = "output"


@dataclass(frozen=True)
class Architecture:
    """A family of decoder-only models: what config.json leaves unsaid, and the order in which a layer runs.

    ValueError for stages that cannot run: see `_refuse_disorder`.
    """

    model_type: str  # as config.json has it
    classes: str  # prefix of transformers' classes: Qwen2
    stages: tuple[Stage, ...]
    package: str = ""  # with configuration_<model_type> and modeling_<model_type>; transformers' own unless said
    attention: str = "self_attn"  # the block that takes positions
    qk_norms: tuple[str, ...] = ()  # norms of head_dim within attention
    defaults: Mapping[str, int | None] = field(default_factory=dict)  # transformers' (5.23); None follows from others
    window: SlidingWindow = SlidingWindow()
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    norm: str = "model.norm"
    head: str = "lm_head"
    gguf: GGUFNames | None = None  # None: this project neither reads nor writes its GGUF files

    def __post_init__(self) -> None:
        _refuse_disorder(self)

    @property
    def modules(self) -> tuple[str, str]:
        """Names of the Python modules with the configuration class and with the network's classes."""
        package = self.package or f"transformers.models.{self.model_type}"
        return f"{package}.configuration_{self.model_type}", f"{package}.modeling_{self.model_type}"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of a layer, in the order they run."""
        return tuple(linear for stage in self.stages for linear in stage.linears)

    @property
    def bias_keys(self) -> tuple[str, ...]:
        """Keys of config.json that switch biases on."""
        return tuple(dict.fromkeys(linear.bias for linear in self.linears if isinstance(linear.bias, str)))

    def stage(self, name: str) -> Stage:
        """The stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)

    def first_of_block(self, stage: Stage) -> Stage:
        """The stage with the norm that the block of `stage` begins with."""
        return next(s for s in self.stages[self.stages.index(stage) :: -1] if s.norm)


def _refuse_disorder(found: Architecture) -> None:
    """ValueError, naming the stage, where stages do not make whole blocks or channel scales have nowhere to go."""
    within, before = "", tuple[Linear, ...]()
    for stage in found.stages:
        where = f"architecture {found.model_type}, stage {stage.name}"
        if bool(stage.norm) == bool(within):
            raise ValueError(f"{where}: a block begins with a norm, and ends with a stage that adds")
        if {linear.path.rpartition(".")[0] for linear in stage.linears} != {within or stage.block}:
            raise ValueError(f"{where}: the linears of a block are in one module")
        if stage.adds and (len(stage.linears) > 1 or stage.linears[0].outputs != ("hidden_size",)):
            raise ValueError(f"{where}: one linear of hidden_size outputs adds to the hidden states")
        if stage.cut not in ("column", "row"):
            raise ValueError(f"{where}: cut is {stage.cut!r}, wanted column or row")
        through_norm = stage.folds_into == stage.norm and not stage.adds
        source = next((linear for linear in before if linear.path == stage.folds_into), None)
        through_linear = source is not None and source.outputs == (stage.inputs,) and stage.block != found.attention
        if stage.folds_into and not through_norm and not through_linear:
            raise ValueError(
                f"{where}: scales fold into the norm before a stage that does not add, or into a linear of as many "
                f"outputs in the stage before it, of a block without attention"
            )
        within = "" if stage.adds else stage.block
        before = () if stage.adds else stage.linears
    if within:
        raise ValueError(f"architecture {found.model_type}: its last stage does not add to the hidden states")


def _attention(*, qkv_bias: bool | str = False, o_bias: bool | str = False) -> tuple[Stage, Stage]:
    """Grouped-query attention with separate projections."""
    heads = {"q_proj": "q_size", "k_proj": "kv_size", "v_proj": "kv_size"}
    projections = tuple(Linear(f"self_attn.{kind}", (size,), qkv_bias) for kind, size in heads.items())
    norm = "input_layernorm"
    return (
        Stage("qkv", projections, "hidden_size", norm, folds_into=norm, fused="self_attn.qkv_proj"),
        Stage("o", (Linear("self_attn.o_proj", ("hidden_size",), o_bias),), "q_size", adds=True, cut="row"),
    )


def _gated_mlp(*, bias: bool | str = False) -> tuple[Stage, Stage]:
    """down(activation(gate(x)) * up(x))."""
    inner = tuple(Linear(f"mlp.{kind}", ("intermediate_size",), bias) for kind in ("gate_proj", "up_proj"))
    down = (Linear("mlp.down_proj", ("hidden_size",), bias),)
    norm = "post_attention_layernorm"
    return (
        Stage("gate_up", inner, "hidden_size", norm, folds_into=norm, fused="mlp.gate_up_proj"),
        Stage("down", down, "intermediate_size", adds=True, cut="row", folds_into="mlp.up_proj"),
    )


def _gguf(architecture: str, *paired: str, unbiased: tuple[str, ...] = ()) -> GGUFNames:
    """llama.cpp's names for the stages above."""
    attention = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
                 "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}  # fmt: skip
    mlp = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names = {f"self_attn.{kind}": name for kind, name in attention.items()}
    names |= {f"mlp.{kind}": name for kind, name in mlp.items()}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    return GGUFNames(architecture, names, paired, unbiased)


_PAIRED = ("self_attn.q_proj", "self_attn.k_proj")

# An architecture of llama.cpp's is read as the first entry that has it.
ARCHITECTURES: dict[str, Architecture] = {
    found.model_type: found
    for found in (
        Architecture(
            "qwen2",
            "Qwen2",
            (*_attention(qkv_bias=True), *_gated_mlp()),
            defaults={"num_key_value_heads": 32},
            gguf=_gguf("qwen2"),
        ),
        Architecture(
            "qwen3",
            "Qwen3",
            (*_attention(qkv_bias="attention_bias", o_bias="attention_bias"), *_gated_mlp()),
            qk_norms=("self_attn.q_norm", "self_attn.k_norm"),
            defaults={"num_key_value_heads": 32, "head_dim": 128},
            gguf=_gguf("qwen3", unbiased=("self_attn.o_proj",)),
        ),
        Architecture(
            "llama",
            "Llama",
            (*_attention(qkv_bias="attention_bias", o_bias="attention_bias"), *_gated_mlp(bias="mlp_bias")),
            gguf=_gguf("llama", *_PAIRED),
        ),
        Architecture(
            "mistral",
            "Mistral",
            (*_attention(), *_gated_mlp()),
            defaults={"num_key_value_heads": 8},
            window=SlidingWindow(switch=""),
            gguf=_gguf("llama", *_PAIRED),
        ),
    )
}


def one_network(ours: str, theirs: str) -> bool:
    """Whether two families compute the same from equal tensors, as Llama and Mistral do: one name in GGUF."""
    one, other = ARCHITECTURES[ours].gguf, ARCHITECTURES[theirs].gguf
    return ours == theirs or (one is not None and one == other)


def known_stages() -> tuple[str, ...]:
    """Names of stages over all architectures, in the order they run."""
    return tuple(dict.fromkeys(stage.name for found in ARCHITECTURES.values() for stage in found.stages))


def known_kinds() -> tuple[str, ...]:
    """Kinds of linears (`q_proj`, ...) over all architectures, in the order they run."""
    return tuple(dict.fromkeys(linear.kind for found in ARCHITECTURES.values() for linear in found.linears))
