"""The audit finds no error and no warning in models of transformers and peft, and the pages on it are true."""

import doctest
from pathlib import Path

import pytest
import torch

import lightning_dropreg as dr

DOCS = Path(__file__).parents[2] / "docs"
transformers = pytest.importorskip("transformers")


def tokens(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) * 7 % 11


def llama():
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        attention_dropout=0.1, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}


def lora():
    peft = pytest.importorskip("peft")
    model, batch = llama()
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)), batch


def vit():
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_labels=3,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])}
    return transformers.ViTForImageClassification(config), batch


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=11, num_mel_bins=8, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=10,
        max_target_positions=12, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    batch = {"input_features": torch.randn(2, 8, 20), "labels": tokens(2, 6)}
    return transformers.WhisperForConditionalGeneration(config), batch


def electra():
    config = transformers.ElectraConfig(
        vocab_size=11, embedding_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    batch = {"input_ids": tokens(3, 6), "labels": torch.tensor([0, 1, 2])}
    return transformers.ElectraForSequenceClassification(config), batch


MODELS = [llama, lora, vit, whisper, electra]


@pytest.mark.parametrize("make", MODELS)
def test_nothing_is_found(make):
    model, batch = make()
    assert [one for one in dr.audit(model.train(), batch) if one.severity != "note"] == []


def test_from_pretrained(tmp_path):
    electra()[0].save_pretrained(tmp_path)
    model = transformers.ElectraForSequenceClassification.from_pretrained(tmp_path)
    found = dr.audit(model, electra()[1])
    assert [(one.id, one.severity) for one in found] == [("eval-in-train", "warning")]
    assert "ElectraForSequenceClassification" in found[0].where
    assert [one for one in dr.audit(model.train(), electra()[1]) if one.severity != "note"] == []


@pytest.mark.parametrize("page", ["audit.md", "placing.md", "howto/own_loss.md", "howto/lora.md"])
def test_pages(page):
    if "lora" in page:
        pytest.importorskip("peft")
    assert tuple(doctest.testfile(str(DOCS / page), module_relative=False)) == (0, _examples(page))


def _examples(page):
    return len(doctest.DocTestParser().get_examples((DOCS / page).read_text()))
