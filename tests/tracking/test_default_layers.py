"""layers="last_attention" on models written by hand and under wrappers: the choice is by structure, not by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels.tracking.layers import select_layers

D = 16
VOCABULARY = 31


def chosen(model: nn.Module) -> list[str]:
    return [layer.name for layer in select_layers(model, "last_attention").layers]


def named(prefix: str, *leaves: str) -> set[str]:
    return {f"{prefix}.{leaf}" for leaf in leaves}


class Attention(nn.Module):
    """Softmax attention whose projections are called as ``names`` says: one fused or three, then the output."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.parts = names
        for name in names:
            setattr(self, name, nn.Linear(D, D * (3 if len(names) == 2 and name == names[0] else 1)))

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, name) for name in self.parts]
        q, k, v = parts[0](x).chunk(3, -1) if len(parts) == 2 else (part(x) for part in parts[:3])
        return parts[-1](F.scaled_dot_product_attention(q, k, v, is_causal=True))


class LinearAttention(nn.Module):
    """No softmax: phi(q) (phi(k)^T v)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(self.q_proj(x)) + 1, F.elu(self.k_proj(x)) + 1, self.v_proj(x)
        return self.o_proj(q @ (k.transpose(-2, -1) @ v))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm layer; its mixer's attribute has the name ``called``."""

    def __init__(self, mixer: nn.Module | None, called: str = "attn") -> None:
        super().__init__()
        self.called = called if mixer is not None else None
        self.norm = nn.LayerNorm(D)
        if mixer is not None:
            setattr(self, called, mixer)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        if self.called:
            x = x + getattr(self, self.called)(self.norm(x))
        return x + self.mlp(x)


def gpt(*mixers: nn.Module | None, called: str = "attn") -> nn.Module:
    """nanoGPT's layout: everything in a ModuleDict, a tied head."""
    model = nn.Module()
    model.transformer = nn.ModuleDict(
        {
            "wte": nn.Embedding(VOCABULARY, D),
            "h": nn.ModuleList(Block(mixer, called) for mixer in mixers),
            "ln_f": nn.LayerNorm(D),
        }
    )
    model.lm_head = nn.Linear(D, VOCABULARY, bias=False)
    model.transformer["wte"].weight = model.lm_head.weight
    return model


PROJECTIONS = [
    ("c_attn", "c_proj"),
    ("qkv", "proj"),
    ("Wqkv", "out_proj"),
    ("query_key_value", "dense"),
    ("att_proj", "attn_out"),
    ("in_proj", "out_proj"),
    ("q", "k", "v", "o"),
    ("wq", "wk", "wv", "wo"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("query", "key", "value", "unifyheads"),
    ("project_q", "project_k", "project_v", "attention_out"),
    ("keys", "queries", "values", "fc_out"),
]


@pytest.mark.parametrize("names", PROJECTIONS, ids=".".join)
@pytest.mark.parametrize("called", ["attn", "mixer", "op"])
def test_projections_by_what_they_are(names: tuple[str, ...], called: str) -> None:
    model = gpt(Attention(*names), Attention(*names), called=called)
    assert set(chosen(model)) == named(f"transformer.h.1.{called}", *names)


@pytest.mark.parametrize("last", [None, LinearAttention])
def test_the_last_layer_with_softmax_attention(last: Callable[[], nn.Module] | None) -> None:
    """A hybrid: the layers after it have no attention, or none with softmax."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    model = gpt(Attention(*names), Attention(*names), *((last() if last else None) for _ in range(2)))
    assert set(chosen(model)) == named("transformer.h.1.attn", *names)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class AnnotatedAttention(nn.Module):
    """The Annotated Transformer's: four linears in one list, the softmax in a function beside the class."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x) for linear in self.linears[:3])
        return self.linears[3](attend(q, k, v))


def test_projections_in_a_list() -> None:
    model = gpt(AnnotatedAttention(), AnnotatedAttention())
    assert set(chosen(model)) == named("transformer.h.1.attn.linears", *"0123")


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(D, D // 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.query(x), self.key(x), self.value(x))


class Heads(nn.Module):
    """One module per head, as in the lecture from which nanoGPT grew."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(2))
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], -1))


def test_a_list_of_heads_is_not_a_stack_of_layers() -> None:
    model = gpt(Heads(), Heads(), called="sa")
    heads = {f"heads.{head}.{leaf}" for head in range(2) for leaf in ("key", "query", "value")}
    assert set(chosen(model)) == named("transformer.h.1.sa", "proj", *heads)


class Flat(nn.Module):
    """A layer whose attention and MLP are its own children."""

    def __init__(self) -> None:
        super().__init__()
        self.att_proj, self.attn_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ff_proj, self.ff_out = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_out(F.scaled_dot_product_attention(*self.att_proj(x).chunk(3, -1)))
        return x + self.ff_out(F.gelu(self.ff_proj(x)))


def test_a_flat_layer() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(Flat() for _ in range(2))
    assert set(chosen(model)) == named("blocks.1", "att_proj", "attn_out")


def test_layers_that_are_attributes() -> None:
    model = nn.Module()
    model.first, model.second = Block(Attention("qkv", "proj")), Block(Attention("qkv", "proj"))
    model.head = nn.Linear(D, VOCABULARY)
    assert set(chosen(model)) == named("second.attn", "qkv", "proj")


def test_layers_in_a_sequential() -> None:
    blocks = nn.Sequential(*(Block(Attention("qkv", "proj")) for _ in range(3)))
    model = nn.Sequential(nn.Embedding(VOCABULARY, D), blocks, nn.LayerNorm(D), nn.Linear(D, VOCABULARY))
    assert set(chosen(model)) == named("1.2.attn", "qkv", "proj")


def test_one_layer_used_three_times() -> None:
    block = Block(Attention("qkv", "proj"))
    model = nn.Module()
    model.blocks = nn.ModuleList([block] * 3)
    assert set(chosen(model)) == named("blocks.0.attn", "qkv", "proj")


def stack(layers: int, projections: tuple[str, ...] = ("qkv", "proj")) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(Attention(*projections)) for _ in range(layers))
    return model


@pytest.mark.parametrize(
    ("order", "right"),
    [
        (("encoder", "decoder"), "decoder"),
        (("decoder", "encoder"), "decoder"),
        (("vision", "text"), "text"),
        (("text", "vit"), "text"),
        (("image_encoder", "trunk"), "trunk"),
        (("trunk", "audio_tower"), "trunk"),
        (("lower", "upper"), "upper"),
    ],
    ids="-".join,
)
def test_several_stacks_written_by_hand(order: tuple[str, str], right: str) -> None:
    """Whatever is deeper, the decoder's or text stack; else the one nearest to the output."""
    model = nn.Module()
    for name in order:
        setattr(model, name, stack(2 if name == right else 5))
    model.head = nn.Linear(D, VOCABULARY)
    assert set(chosen(model)) == named(f"{right}.blocks.1.attn", "qkv", "proj")


def test_the_stack_beside_the_output_head() -> None:
    model = nn.Module()
    model.lm, model.other = stack(2), stack(5)
    model.lm.wte, model.lm.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
    assert set(chosen(model)) == named("lm.blocks.1.attn", "qkv", "proj")


def llama(layers: int = 2) -> nn.Module:
    sizes = {"hidden_size": D, "intermediate_size": D, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))


def vision_tower() -> nn.Module:
    sizes = {"hidden_size": D, "intermediate_size": D, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(num_hidden_layers=5, **sizes))


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("order", [("vision", "llm"), ("llm", "vision")], ids="-".join)
def test_transformers_models_joined_by_hand(order: tuple[str, str]) -> None:
    """The part with an output embedding, though both have ``get_decoder``."""
    model = nn.Module()
    for name in order:
        setattr(model, name, vision_tower() if name == "vision" else llama())
    assert set(chosen(model)) == named("llm.model.layers.1.self_attn", *QKVO)


def test_a_transformers_vision_tower_before_own_layers() -> None:
    model = nn.Module()
    model.tower, model.blocks = vision_tower(), stack(2).blocks
    model.wte, model.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
    assert set(chosen(model)) == named("blocks.1.attn", "qkv", "proj")


class ValueHead(nn.Module):
    """A critic around a language model, as TRL makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_model = llama()
        self.v_head = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 1))


@contextmanager
def ranks_of_one(path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["compile", "value head", "ddp", "two of them"])
def test_wrapped_models(wrapper: str, tmp_path: Path) -> None:
    inside = "model.layers.1.self_attn"
    if wrapper == "compile":
        model, prefix = torch.compile(llama()), "_orig_mod"
    elif wrapper == "value head":
        model, prefix = ValueHead(), "pretrained_model"
    else:
        with ranks_of_one(tmp_path):
            inner = llama() if wrapper == "ddp" else torch.compile(llama())
            model = nn.parallel.DistributedDataParallel(inner)
        prefix = "module" if wrapper == "ddp" else "module._orig_mod"
    assert set(chosen(model)) == named(f"{prefix}.{inside}", *QKVO)


def test_adapters_of_the_chosen_projections() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(llama(), config)
    prefix = "base_model.model.model.layers.1.self_attn"
    adapters = {f"{name}.lora_{side}.default" for name in ("q_proj", "v_proj") for side in "AB"}
    assert set(chosen(model)) == named(prefix, *adapters)
    frozen = {layer.name for layer in select_layers(model, "last_attention", frozen=True).layers}
    still = {"q_proj.base_layer", "v_proj.base_layer", "k_proj", "o_proj"}
    assert frozen == named(prefix, *adapters, *still)


def torch_decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(D, 2, 2 * D, batch_first=True)
    model = nn.Module()
    model.decoder, model.head = nn.TransformerDecoder(layer, 2), nn.Linear(D, VOCABULARY)
    return model


def test_multihead_attention_is_refused_by_name() -> None:
    """Its q, k and v are a parameter, not modules; the message names linears of the same layer."""
    with pytest.raises(ValueError, match=r"'decoder\.layers\.1\.self_attn' \(MultiheadAttention\)") as error:
        gk.GradNormTracker(torch_decoder())
    assert "decoder.layers.1.linear1" in str(error.value)
    assert gk.GradNormTracker(torch_decoder(), ["decoder.layers.1.linear1"]).layers == ["decoder.layers.1.linear1"]


WITHOUT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mamba": (
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, state_size=4, time_step_rank=2)
        ),
        "backbone.layers.1",
    ),
    "rwkv": (
        lambda: tf.RwkvForCausalLM(
            tf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=D, attention_hidden_size=D, num_hidden_layers=2)
        ),
        "rwkv.blocks.1",
    ),
    "mlp": (lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)), "2"),
    "hand-written mlp": (Mlp, "down"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_attention_the_message_says_which_layers_would_do(name: str) -> None:
    build, layer = WITHOUT[name]
    with pytest.raises(
        ValueError, match=r"found no attention with a softmax|needs a model with a list of decoder layers"
    ) as error:
        gk.GradNormTracker(build())
    assert f'layers=["{layer}"]' in str(error.value)
    assert gk.GradNormTracker(build(), [layer]).layers
