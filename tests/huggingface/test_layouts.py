"""What our models compute from Hugging Face folders, against `transformers` itself, in every layout (fp32)."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = 131  # a prime
SIZES = dict(
    hidden_size=48, intermediate_size=44, num_hidden_layers=4, vocab_size=VOCABULARY, max_position_embeddings=512,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=3.0)
# name: (class, heads, key/value heads, settings)
MODELS = {
    "llama": ("LlamaForCausalLM", 4, 4, dict()),
    "llama-tied-gqa": ("LlamaForCausalLM", 8, 4, dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama-3": ("LlamaForCausalLM", 12, 4, dict(rope_parameters=LLAMA3)),
    "llama-linear": ("LlamaForCausalLM", 8, 2, dict(rope_parameters=LINEAR)),
    "llama-wide-heads": ("LlamaForCausalLM", 4, 2, dict(head_dim=20)),
    "mistral": ("MistralForCausalLM", 8, 4, dict(sliding_window=None)),
    "mistral-window": ("MistralForCausalLM", 4, 1, dict(sliding_window=7)),
    "qwen2": ("Qwen2ForCausalLM", 4, 4, dict(tie_word_embeddings=True)),
    "qwen2-gqa": ("Qwen2ForCausalLM", 12, 2, dict()),
    "qwen3": ("Qwen3ForCausalLM", 8, 4, dict(head_dim=10)),
    "qwen3-tied": ("Qwen3ForCausalLM", 4, 1, dict(head_dim=16, tie_word_embeddings=True)),
    "llama-judge": ("LlamaForSequenceClassification", 8, 4, dict(num_labels=1)),
    "qwen3-judge": ("Qwen3ForSequenceClassification", 4, 4, dict(num_labels=1, head_dim=14)),
}
# The authors' scoring models: a trunk with a head of its own and a normalizer that may count.
SCORES = {"llama-score": (False, "reward"), "llama-score-normalized": (True, "reward"), "llama-cost": (True, "cost")}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2)]
"""Tensor and pipeline sizes, and interleaved chunks of layers on each pipeline rank."""
GROUPS = {name: groups for name, (_, _, groups, _) in MODELS.items()} | dict.fromkeys(SCORES, 4)


def randomize(model, seed: int) -> None:
    """Norms and biases too: at their 1 and 0 a mistake in them would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def tokens_BS():
    return torch.randint(3, VOCABULARY, (3, 41), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokens_BS):
    """({name: folder}, {name: logits [B, S, V] or scores [B, S] by transformers})."""
    root, folders, expected = tmp_path_factory.mktemp("published"), {}, {}
    for seed, (name, (kind, heads, groups, settings)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        kind = getattr(transformers, kind)
        config = kind.config_class(**SIZES | dict(num_attention_heads=heads, num_key_value_heads=groups) | settings)
        config._attn_implementation = "eager"
        model = kind(config).float().eval()
        randomize(model, seed)
        folders[name] = str(root / name)
        model.save_pretrained(folders[name], max_shard_size="60KB")
        with torch.no_grad():
            if config.num_labels == 1:
                expected[name] = model.score(model.model(tokens_BS).last_hidden_state)[..., 0]
            else:
                expected[name] = model(tokens_BS).logits
    for name, (normalized, kind) in SCORES.items():
        trunk = transformers.LlamaModel(
            transformers.LlamaConfig(**SIZES | dict(num_attention_heads=8, num_key_value_heads=4))
        ).eval()
        randomize(trunk, 50)
        generator = torch.Generator().manual_seed(51)
        head = {key: torch.randn(shape, generator=generator) for key, shape in (
            ("score_head.weight", (1, 48)), ("score_head.bias", (1,)), ("normalizer.mean", (1,)),
        )}  # fmt: skip
        head["normalizer.var"] = torch.tensor([2.5])
        (root / name).mkdir()
        weights = {f"model.{key}": value.contiguous() for key, value in trunk.state_dict().items()}
        save_file(weights | head, root / name / "model.safetensors", metadata={"format": "pt"})
        config = trunk.config.to_dict() | dict(
            architectures=["LlamaForScore"], score_dim=1, score_type=kind, bias=True, do_normalize=normalized
        )
        (root / name / "config.json").write_text(json.dumps(config))
        folders[name] = str(root / name)
        with torch.no_grad():
            hidden = trunk(tokens_BS).last_hidden_state
            scores = (hidden @ head["score_head.weight"].T + head["score_head.bias"])[..., 0]
        mean = head["normalizer.mean"] if kind == "reward" else 0.0  # safe-rlhf shifts rewards and scales both
        expected[name] = (scores - mean) / head["normalizer.var"].sqrt() if normalized else scores
    return folders, expected


@pytest.mark.parametrize("tp, pp, chunks", LAYOUTS)
def test_logits_and_scores_are_those_of_transformers(published, tokens_BS, torchrun, tmp_path, tp, pp, chunks):
    folders, expected = published
    chosen = {name: folder for name, folder in folders.items() if GROUPS[name] % tp == 0}
    assert len(chosen) >= 8
    plan = tmp_path / "plan.json"
    parallel = dict(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=chunks
    )
    plan.write_text(json.dumps({"parallel": parallel, "folders": chosen, "tokens": tokens_BS.tolist()}))
    torchrun(tp * pp, "read_huggingface.py", str(plan))
    found = load_file(plan.with_suffix(".safetensors"))
    assert found.keys() == chosen.keys()
    for name, output in found.items():
        assert expected[name].std() > 0.3
        torch.testing.assert_close(output, expected[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
