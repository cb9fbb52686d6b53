"""The rival of tools/benchmark_step.py: a PPO-Lag step on six Hugging Face Llamas, as Safe RLHF's authors write it.

Rollouts come from `generate` with its cache, on left-padded prompts, and stay padded from there on. Each batch goes
through all six models once more (the actor too: the old log-probabilities are those of a plain forward), then the actor
and both critics take one optimizer step each, micro-batch by micro-batch. The formulas are those of `eager.py`.

It is meant to be as fast as such a program is: SDPA attention, fused AdamW, no gradient and no key/value cache where
none is needed, no copies of logits, and micro-batches of the size that suits it best.

Legend: B rows, P longest prompt, N longest answer, L = P + N, T = L - 1 actions (column t predicts token t + 1).
"""

import logging
import warnings
from collections import deque
from dataclasses import dataclass

import torch
from eager import eager_gae, eager_lagrange_step, eager_value_loss
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, StoppingCriteria

from megatron_safe.config import ModelConfig, PpoConfig

PAD = 0

# Once per process, and only that a configuration without EOS is unusual.
logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="transformers")


class Limits(StoppingCriteria):
    """Ends each row at a length of its own, at the price of the check for EOS that it stands for."""

    eos_token_id = None  # `generate` pads the rows that have ended when a criterion has this attribute

    def __init__(self, lengths_B: torch.Tensor):
        self.lengths_B = lengths_B

    def __call__(self, input_ids, scores, **_):
        return self.lengths_B <= input_ids.size(1)


class ScoreModel(torch.nn.Module):
    """A Llama with a scalar head; [B, S] scores."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.trunk = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, 1)
        torch.nn.init.normal_(self.head.weight, std=config.initializer_range)

    def forward(self, tokens_BS, attention_mask_BS):
        hidden_BSh = self.trunk(tokens_BS, attention_mask=attention_mask_BS, use_cache=False).last_hidden_state
        return self.head(hidden_BSh).squeeze(-1)


@dataclass(frozen=True)
class Rollout:
    """tokens [B, L]: prompts padded on the left, answers on the right; both masks are 1 on what counts."""

    tokens_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    mask_BT: torch.Tensor


@dataclass(frozen=True)
class Scored:
    """[B] and [B, T], fp32."""

    rollout: Rollout
    log_probs_BT: torch.Tensor
    ref_log_probs_BT: torch.Tensor
    rewards_B: torch.Tensor
    costs_B: torch.Tensor
    reward_values_BT: torch.Tensor
    cost_values_BT: torch.Tensor


def log_probs(model: LlamaForCausalLM, tokens_BL, attention_mask_BL, temperature: float):
    """[B, T] log-probability of each token after the first."""
    logits_BTV = model(tokens_BL[:, :-1], attention_mask=attention_mask_BL[:, :-1], use_cache=False).logits
    if temperature != 1.0:
        logits_BTV = logits_BTV / temperature
    return logits_BTV.log_softmax(dim=-1).gather(2, tokens_BL[:, 1:, None]).squeeze(-1)


def actor_loss(log_probs_BT, old_log_probs_BT, reward_BT, cost_BT, weights_BT, lam: float, clip_ratio: float):
    """The clipped surrogate of (Â_r - λ Â_c) / (1 + λ), summed with `weights_BT`."""
    advantages_BT = (reward_BT - lam * cost_BT) / (1.0 + lam)
    ratio_BT = (log_probs_BT - old_log_probs_BT).exp()
    clipped_BT = ratio_BT.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    return -(torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT) * weights_BT).sum()


class Rival:
    """Six models, three optimizers and λ. `config` is the one that our side trains with; `score_rows` and `train_rows`
    are the micro-batches."""

    def __init__(self, config: PpoConfig, model: ModelConfig, vocab_size: int, score_rows: int, train_rows: int):
        self.config, self.score_rows, self.train_rows = config, score_rows, train_rows
        llama = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups or model.num_attention_heads,
            max_position_embeddings=model.max_sequence_length,
            rms_norm_eps=model.norm_epsilon,
            initializer_range=model.init_std,
            tie_word_embeddings=model.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(config.run.seed)
        self.actor, self.reference = LlamaForCausalLM(llama), LlamaForCausalLM(llama).requires_grad_(False)
        self.reward_model, self.cost_model = (ScoreModel(llama).requires_grad_(False) for _ in range(2))
        self.reward_critic, self.cost_critic = ScoreModel(llama), ScoreModel(llama)
        critic = config.critic_optimizer
        learners = {self.actor: config.actor_optimizer, self.reward_critic: critic, self.cost_critic: critic}
        self.optimizers = {
            module: torch.optim.AdamW(
                module.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay,
                fused=True,
            )
            for module, o in learners.items()
        }  # fmt: skip
        self.lam = config.lagrange.lambda_init
        self.episode_costs_W = deque(maxlen=config.lagrange.episode_cost_window)

    @torch.no_grad()
    def generate(self, tokens_BP: torch.Tensor, attention_mask_BP: torch.Tensor, limits_B: torch.Tensor, seed: int):
        """One answer to each left-padded prompt, of `limits_B` tokens."""
        rollout, width = self.config.rollout, tokens_BP.size(1)
        torch.manual_seed(seed)
        tokens_BL = self.actor.generate(
            tokens_BP,
            attention_mask=attention_mask_BP,
            generation_config=GenerationConfig(
                do_sample=True, temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p,
                max_new_tokens=rollout.max_new_tokens, use_cache=True, pad_token_id=PAD,
            ),
            stopping_criteria=[Limits(width + limits_B)],
        )  # fmt: skip
        answers_BN = torch.arange(tokens_BL.size(1) - width) < limits_B[:, None]
        attention_mask_BL = torch.cat([attention_mask_BP, answers_BN.to(attention_mask_BP.dtype)], dim=1)
        mask_BT = torch.cat([torch.zeros_like(tokens_BP[:, 1:], dtype=torch.bool), answers_BN], dim=1)
        return Rollout(tokens_BL, attention_mask_BL, mask_BT)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Scored:
        """What all six models make of a rollout."""
        parts = []
        temperature = self.config.rollout.temperature
        for rows in self._micro_batches(len(rollout.tokens_BL), self.score_rows):
            tokens, attention = rollout.tokens_BL[rows], rollout.attention_mask_BL[rows]
            last_b1 = rollout.mask_BT[rows].int().cumsum(dim=1).argmax(dim=1, keepdim=True) + 1
            parts.append((
                log_probs(self.actor, tokens, attention, temperature),
                log_probs(self.reference, tokens, attention, temperature),
                self.reward_model(tokens, attention).gather(1, last_b1)[:, 0],
                self.cost_model(tokens, attention).gather(1, last_b1)[:, 0],
                self.reward_critic(tokens[:, :-1], attention[:, :-1]),
                self.cost_critic(tokens[:, :-1], attention[:, :-1]),
            ))  # fmt: skip
        return Scored(rollout, *(torch.cat(column) for column in zip(*parts, strict=True)))

    def train(self, scored: Scored) -> dict[str, float]:
        """λ, advantages, and one optimizer step of actor and critics; the losses before it."""
        ppo, lagrange, rollout = self.config.ppo, self.config.lagrange, scored.rollout
        self.lam = eager_lagrange_step(
            self.lam, self.episode_costs_W, scored.costs_B, lagrange.lambda_lr, lagrange.threshold,
            lagrange.lambda_min, lagrange.lambda_max,
        )  # fmt: skip
        reward_BT, cost_BT, reward_returns_BT, cost_returns_BT = eager_gae(
            scored.log_probs_BT, scored.ref_log_probs_BT, scored.rewards_B, scored.costs_B, scored.reward_values_BT,
            scored.cost_values_BT, rollout.mask_BT, ppo.kl_coeff, ppo.score_clip, ppo.gamma, ppo.gae_lambda,
        )  # fmt: skip
        weights_BT = rollout.mask_BT / (rollout.mask_BT.sum(dim=1, keepdim=True) * len(rollout.mask_BT))

        def surrogate(rows, tokens, attention):
            found_bT = log_probs(self.actor, tokens, attention, self.config.rollout.temperature)
            return actor_loss(
                found_bT, scored.log_probs_BT[rows], reward_BT[rows], cost_BT[rows], weights_BT[rows], self.lam,
                ppo.clip_ratio,
            )  # fmt: skip

        def value(critic, old_BT, returns_BT):
            return lambda rows, tokens, attention: eager_value_loss(
                critic(tokens[:, :-1], attention[:, :-1]), old_BT[rows], returns_BT[rows], weights_BT[rows],
                ppo.clip_value,
            )  # fmt: skip

        reward_loss = value(self.reward_critic, scored.reward_values_BT, reward_returns_BT)
        cost_loss = value(self.cost_critic, scored.cost_values_BT, cost_returns_BT)
        return {
            "actor_loss": self._update(self.actor, rollout, surrogate, self.config.actor_optimizer.clip_grad),
            "reward_critic_value_loss": self._update(
                self.reward_critic, rollout, reward_loss, self.config.critic_optimizer.clip_grad
            ),
            "cost_critic_value_loss": self._update(
                self.cost_critic, rollout, cost_loss, self.config.critic_optimizer.clip_grad
            ),
        }

    def _update(self, module, rollout: Rollout, loss, clip_grad: float) -> float:
        total = 0.0
        for rows in self._micro_batches(len(rollout.tokens_BL), self.train_rows):
            part = loss(rows, rollout.tokens_BL[rows], rollout.attention_mask_BL[rows])
            part.backward()
            total += part.item()
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip_grad)
        self.optimizers[module].step()
        self.optimizers[module].zero_grad(set_to_none=True)
        return total

    @staticmethod
    def _micro_batches(rows: int, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, rows, size)]
