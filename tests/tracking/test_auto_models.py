"""The choice of default layers in every model class of transformers' auto mappings, against a run of the model.

The module that computes attention last in a forward on token ids belongs to the last layer with attention of the text
decoder. A forward that cannot run on the meta device is held to rules on names instead.
"""

from __future__ import annotations

import re
from itertools import takewhile

import pytest
from torch import nn

from gradnorm_kernels.tracking.attention import last_attention
from tests.tracking.models import auto

CLASSES = auto.every_class()

#: One or two of every kind of architecture.
_FAST = """
AlbertForSequenceClassification AriaForConditionalGeneration AudioFlamingo3ForConditionalGeneration BambaForCausalLM
BartForCausalLM BartForConditionalGeneration BertForSequenceClassification BertLMHeadModel BloomForCausalLM
DebertaForSequenceClassification DeepseekV3ForCausalLM DistilBertForSequenceClassification EncoderDecoderModel
FalconH1ForCausalLM FuyuForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM Gemma3ForConditionalGeneration
GptOssForCausalLM JambaForCausalLM Lfm2ForCausalLM LlamaForCausalLM LlavaForConditionalGeneration MambaForCausalLM
MiniMaxForCausalLM MllamaForCausalLM MoonshineForConditionalGeneration MptForCausalLM NemotronHForCausalLM
OPTForCausalLM OlmoHybridForCausalLM PaliGemmaForConditionalGeneration Qwen2AudioForConditionalGeneration
Qwen2VLForConditionalGeneration Qwen3NextForCausalLM RecurrentGemmaForCausalLM SmolVLMForConditionalGeneration
T5ForConditionalGeneration WhisperForConditionalGeneration XLNetLMHeadModel
"""
FAST = set(_FAST.split())
#: Attention whose projections are no linear modules is refused by name, with what they are.
REFUSED = {
    "XLNetLMHeadModel": "parameters",
    "XLNetForSequenceClassification": "parameters",
    "SqueezeBertForSequenceClassification": "convolutions",
    "IBertForSequenceClassification": "quantized linears",
}
#: The run does not show the last attention (scores of another shape than one query and one key per token, a kernel that
#: is no softmax, or a router's softmax behind it) -> where it is: in the last of six layers, as their sources say.
OTHER_SCORES = {
    "CpmAntForCausalLM": "cpmant.encoder.layers.5.self_att.self_attention.",  # its softmax is a module of its own
    "DeepseekV4ForCausalLM": "model.layers.5.self_attn.",  # its last layer attends to compressed tokens
    "Inkling2ForCausalLM": "model.layers.5.self_attn.",  # the mixture of its final input is a softmax too
    "Inkling2ForConditionalGeneration": "model.language_model.layers.5.self_attn.",
    "MraForSequenceClassification": "mra.encoder.layer.5.attention.",  # approximated scores
    "ReformerForSequenceClassification": "reformer.encoder.layers.5.attention.",  # scores of hashed buckets
    "YosoForSequenceClassification": "yoso.encoder.layer.5.attention.",  # approximated scores
    "ZayaForCausalLM": "model.layers.5.self_attn.",  # its router's softmax comes later
    "FunnelForSequenceClassification": "funnel.encoder.blocks.2.3.",  # its blocks pool the tokens
    "PerceiverForSequenceClassification": "perceiver.decoder.decoder.decoding_cross_attention.",  # one query per class
}
OTHER_MODALITIES = re.compile(r"(^|[._])(vision|visual|image|audio|speech|tower|qformer|vit)([._]|$)")


def build(name: str) -> nn.Module:
    try:
        return auto.build(name, CLASSES[name])
    except Exception as error:
        pytest.skip(f"no model from the default configuration: {type(error).__name__}: {str(error)[:80]}")


def check_names(model: nn.Module, chosen: list[str]) -> None:
    """Without a run: one layer, not of another modality, and no later layer with attention of the same class."""
    levels = list(zip(*(name.split(".") for name in chosen), strict=False))
    parts = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    assert not OTHER_MODALITIES.search(".".join(parts))
    assert numbers, parts
    stack = model.get_submodule(".".join(parts[: numbers[0]]))
    holder = model.get_submodule(chosen[0].rpartition(".")[0])
    for later in list(stack.children())[int(parts[numbers[0]]) + 1 :]:
        assert not any(type(module) is type(holder) for module in later.modules())


def test_fast_classes_exist() -> None:
    assert not FAST - CLASSES.keys()
    assert not REFUSED.keys() - CLASSES.keys()
    assert not OTHER_SCORES.keys() - CLASSES.keys()


def check(name: str) -> None:
    model = build(name)
    try:
        chosen, refusal = last_attention(model), ""
    except ValueError as error:
        chosen, refusal = [], str(error)
    if name in REFUSED:
        assert "whose projections are not linear modules" in refusal
        return
    if name in OTHER_SCORES:
        assert chosen
        assert all(module.startswith(OTHER_SCORES[name]) for module in chosen)
        return
    try:
        at = auto.last_attention_call(model, **auto.text_inputs(model))
    except Exception:  # values of tensors, images or sound are needed
        check_names(model, chosen)
        return
    if at is None:
        assert "found no attention with a softmax" in refusal
        return
    assert any(module.startswith(f"{at}.") for module in chosen), f"attention is computed last in {at}, chosen {chosen}"


@pytest.mark.parametrize("name", sorted(FAST))
def test_the_last_attention_of_a_run(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLASSES.keys() - FAST))
def test_the_last_attention_of_every_run(name: str) -> None:
    check(name)


def test_a_wrong_choice_is_found() -> None:
    """The run itself says where attention is: in the decoder, not in the deeper encoder."""
    model = build("T5ForConditionalGeneration")
    at = auto.last_attention_call(model, **auto.text_inputs(model))
    assert at == "decoder.block.5.layer.1.EncDecAttention"
    with pytest.raises(AssertionError):
        check_names(model, ["decoder.block.2.layer.1.EncDecAttention.q"])
