"""Tiny models of every kind, as `transformers` and safe-rlhf save them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = 131  # a prime
SIZES = dict(
    hidden_size=32, intermediate_size=44, num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=64,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", dict(tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", dict(sliding_window=7)),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=10)),
    "llama-judge": ("LlamaForSequenceClassification", dict(num_labels=1)),
    "llama-score": ("LlamaForScore", dict(do_normalize=False)),
    "llama-score-normalized": ("LlamaForScore", dict(do_normalize=True)),
}


@dataclass
class Saved:
    """A folder, and what `transformers` computes from it in fp32."""

    folder: Path
    trunk: torch.nn.Module
    language: torch.nn.Module | None

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value for file in self.folder.glob("*.safetensors") for name, value in load_file(file).items()}

    @torch.no_grad()
    def output(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V], or scores [B, S]."""
        if self.language is not None:
            return self.language(tokens_BS).logits
        found, config = self.weights(), json.loads((self.folder / "config.json").read_text())
        weight = found.get("score.weight", found.get("score_head.weight"))
        scores = (self.trunk(tokens_BS).last_hidden_state @ weight.float().T)[..., 0]
        scores = scores + found.get("score_head.bias", torch.zeros(1))
        if config.get("do_normalize"):
            scores = (scores - found["normalizer.mean"]) / (found["normalizer.var"].sqrt() + 1e-8)
        return scores


def save(name: str, folder: Path, shard_size: str = "30KB", seed: int = 0) -> Saved:
    kind, settings = KINDS[name]
    torch.manual_seed(seed)
    scored = kind == "LlamaForScore"
    kind = transformers.LlamaForCausalLM if scored else getattr(transformers, kind)
    settings = {} if scored else settings
    config = kind.config_class(**SIZES | settings)
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: at 1 and 0 a mistake in them would not show
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    if scored:
        _save_score(model, folder, KINDS[name][1]["do_normalize"])
    else:
        model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text('{"spaces kept":   true}')
    (folder / "README.md").write_text("A tiny model.\r\n")
    language = model if model.config.architectures and not scored and hasattr(model, "lm_head") else None
    return Saved(folder, model.model, language)


def _save_score(model, folder: Path, normalized: bool) -> None:
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith("model.")}
    weights["score_head.weight"] = torch.randn(1, SIZES["hidden_size"])
    weights["score_head.bias"] = torch.randn(1)
    weights["normalizer.mean"], weights["normalizer.var"] = torch.tensor([0.7]), torch.tensor([2.5])
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | dict(
        architectures=["LlamaForScore"], score_dim=1, score_bias=True, score_type="reward", do_normalize=normalized,
        normalizer_type="affine" if normalized else None,
    )
    (folder / "config.json").write_text(json.dumps(config, indent=3))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name -> the model of that kind, saved once; not to be touched."""
    made: dict[str, Saved] = {}

    def make(name: str) -> Saved:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp("models") / name, seed=len(made))
        return made[name]

    return make


@pytest.fixture(scope="session")
def kinds() -> list[str]:
    return list(KINDS)


@pytest.fixture(scope="session")
def tokens_BS() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 19), generator=torch.Generator().manual_seed(1))


def same_files(one: Path, other: Path) -> None:
    """Both folders hold the same files, to the byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(name="same_files")
def same_files_fixture():
    return same_files
