"""What `transformers` makes of folders that we wrote, by its own from_pretrained.

usage: load_transformers.py PLAN.json

The plan: {"folders": {name: folder}, "tokens": [[...]]}. Logits [B, S, V] of a language model, scores [B, S] of a
...ForScore (with the head as safe-rlhf computes it) and the last token's [B] of a ...ForSequenceClassification go to
PLAN.safetensors under their names; what else is to be known of each to PLAN.out.json.

A program of its own: started on a CPU, our runtime wraps torch's factories, and from_pretrained needs them bare.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    tokens_BS = torch.tensor(plan["tokens"])
    outputs, facts = {}, {}
    for name, folder in plan["folders"].items():
        (architecture,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
        kind = "Model" + architecture[architecture.index("For") :] if "Score" not in architecture else "Model"
        model, info = getattr(transformers, f"Auto{kind}").from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        if "Score" in architecture:
            output = score(model(tokens_BS).last_hidden_state, Path(folder))
        else:
            output = model(tokens_BS).logits
            output = output[:, 0] if kind.endswith("Classification") else output
        outputs[name] = output.contiguous()
        config, generation = model.config, getattr(model, "generation_config", None)
        facts[name] = {
            "class": type(model).__name__,
            "dtype": str(model.dtype),
            "ids": [config.pad_token_id, config.bos_token_id, config.eos_token_id],
            "generation_eos": generation and generation.eos_token_id,
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
        }
    save_file(outputs, path.with_suffix(".safetensors"))
    path.with_suffix(".out.json").write_text(json.dumps(facts))


def score(hidden_BSh: torch.Tensor, folder: Path) -> torch.Tensor:
    head = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    scores_BS = torch.nn.functional.linear(hidden_BSh, head["score_head.weight"], head["score_head.bias"])[..., 0]
    if not json.loads((folder / "config.json").read_text()).get("do_normalize"):
        return scores_BS
    return (scores_BS - head["normalizer.mean"]) / (head["normalizer.var"].sqrt() + 1e-8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
