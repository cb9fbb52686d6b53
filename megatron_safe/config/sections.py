"""Sections of the settings, as typed dataclasses. Field docs are what `megatron-safe STAGE --help` prints."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RunConfig:
    out: str = "runs/run"
    """Run folder: resolved config, metrics.jsonl, TensorBoard, checkpoints."""
    seed: int = 0
    """Seed of weights, data order and sampling; the same in every layout."""
    resume: Literal["no", "auto"] = "no"
    """`auto` goes on from the last good checkpoint in the run folder; `no` refuses a folder that holds a run."""
    save_every: int = 0
    """Checkpoint every this many steps (0: only at the end)."""
    keep_last: int = 2
    """How many checkpoints stay on disk; older ones are deleted after a newer one is published."""
    stop_after: int = 0
    """Checkpoint and stop after this step, as if the time limit had come (0: run to the end)."""
    tensorboard: bool = True
    """Write TensorBoard scalars next to metrics.jsonl."""
    wandb_project: str | None = None
    """Weights & Biases project (needs `pip install wandb`)."""


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (Megatron TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers (Megatron PP). Data parallelism takes what is left of the world."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers on each pipeline rank (Megatron's interleaved schedule): smaller bubbles, more messages."""
    context_parallel_size: int = 1
    """Ranks that share each sequence's tokens, for sequences too long for one (Megatron CP)."""
    sequence_parallel: bool = False
    """Between a layer's matrices each tensor-parallel rank keeps some of the tokens, which saves activations (needs a
    tensor size above 1)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, core attention, or whole layers."""
    timeout_seconds: float = 600.0
    """A collective that takes longer than this fails the run."""


@dataclass
class KernelsConfig:
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Fused operations: `auto` is Triton on CUDA and vectorised PyTorch on CPU."""


@dataclass
class TokenizerConfig:
    path: str = ""
    """Folder with a Hugging Face `tokenizer.json` or a SentencePiece `.model`, or that file itself."""
    template: str = "safe-rlhf"
    """Prompt template: `safe-rlhf`, `alpaca`, `plain`, `chat` (the checkpoint's own), or a format string with {prompt}.
    A dialogue repeats it for each exchange, but for what stands before {turn}, if it has that. With `chat`, responses
    end with the token that ends the assistant's turn there."""


@dataclass
class ModelConfig:
    """A Llama: RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    checkpoint: str | None = None
    """Run folder or checkpoint to start from; its architecture replaces the fields below."""
    num_layers: int = 2
    """Transformer layers; divisible by the pipeline size."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 344
    """Width of the SwiGLU hidden layer."""
    num_attention_heads: int = 4
    """Query heads; divisible by the tensor size."""
    num_query_groups: int | None = None
    """Key/value heads (default: as many as query heads); divisible by the tensor size."""
    rotary_base: float = 10000.0
    """RoPE base frequency."""
    norm_epsilon: float = 1e-5
    """RMSNorm epsilon."""
    max_sequence_length: int = 2048
    """Longest sequence, prompt and answer together."""
    tie_embeddings: bool = False
    """Share the input embedding with the output layer."""
    init_std: float = 0.02
    """Standard deviation of fresh weights (output projections: / sqrt(2 layers))."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this; a multiple of every tensor size you mean to use."""
    head_dim: int | None = None
    """Size of an attention head (default: hidden_size / num_attention_heads)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen 2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen 3)."""
    sliding_window: int | None = None
    """A token sees itself and this many - 1 before it (Mistral; default: all before it)."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """How RoPE's frequencies are stretched for long sequences."""
    rope_factor: float = 1.0
    """By how much (linear, llama3)."""
    rope_low_freq_factor: float = 1.0
    """llama3: wavelengths above rope_original_max_position / this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths below rope_original_max_position / this are left alone."""
    rope_original_max_position: int = 8192
    """llama3: the length that the model was first trained on."""
    score_bias: bool = True
    """Scalar heads: whether they have a bias."""
    score_mean: float = 0.0
    """Scalar heads: subtracted from the score (a published model's normalizer)."""
    score_std: float = 1.0
    """Scalar heads: divides it then."""


@dataclass
class OptimizerConfig:
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay after the warm-up."""
    warmup_steps: int = 0
    """Linear warm-up, in optimizer steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay (none on norms and biases)."""
    beta1: float = 0.9
    """AdamW first moment."""
    beta2: float = 0.95
    """AdamW second moment."""
    eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron DistributedOptimizer)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while backward still makes others."""
    overlap_param_gather: bool = False
    """Gather what a sharded optimizer has updated while forward uses what is there already (needs distributed and
    overlap_grad_reduce)."""


@dataclass
class BatchConfig:
    global_batch_size: int = 8
    """Rows per optimizer step, over all data-parallel ranks (pairs, for reward and cost)."""
    max_tokens_per_micro_batch: int = 8192
    """Tokens per forward and backward pass on one rank; rows are packed end to end, without padding."""
    max_length: int = 512
    """Longest prompt + answer in tokens. A longer dialogue loses its oldest turns, then an answer is cut, and a prompt
    too long by itself is skipped; all counted."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type; bf16 keeps fp32 master weights and gradients."""


@dataclass
class SftTrainingConfig:
    steps: int = 1000
    """Optimizer steps."""
    loss_turns: Literal["last", "all"] = "last"
    """Which of the assistant's turns in a dialogue the loss counts: the response, or those in its history too."""


@dataclass
class PreferenceTrainingConfig:
    steps: int = 1000
    """Optimizer steps."""
    score_l2: float = 0.001
    """Coefficient of the mean squared score (the authors' `regularization`)."""


@dataclass
class DataConfig:
    train: list[str | dict[str, Any]] = field(default_factory=list)
    """What to train on. Each entry is a path (JSONL of our own form) or {path, source, split, weight, question}: source
    is the published form, weight the entry's part of every batch (default: all rows alike)."""
    eval: list[str | dict[str, Any]] = field(default_factory=list)
    """Held-out entries, measured at the end (optional); no weights."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that is not as its source describes ends the run, or is left out and counted."""


@dataclass
class PpoDataConfig:
    prompts: list[str | dict[str, Any]] = field(default_factory=list)
    """Prompts: entries as in `data.train` of the other stages; rows {"prompt": str, "red_team": bool, "category": str}.
    """
    ptx: list[str | dict[str, Any]] = field(default_factory=list)
    """Demonstrations for the PTX term (needed when ppo.ptx_coeff > 0), which counts the last turn of each."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that is not as its source describes ends the run, or is left out and counted."""


@dataclass
class RolloutConfig:
    max_new_tokens: int = 128
    """Longest answer, EOS included."""
    max_prompt_length: int = 128
    """Longest prompt in tokens. A longer dialogue loses its oldest turns, and a prompt too long by itself is skipped;
    both counted."""
    temperature: float = 1.0
    """Sampling temperature; also divides the logits of the training log-probabilities. 0 is greedy (not for PPO)."""
    verify_logprobs: bool = False
    """PPO: measure by one more forward of the actor how far its log-probabilities are from the rollout's."""
    top_k: int = 0
    """Sample from the k likeliest tokens only (0: all)."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability (1: all)."""
    slots: int = 0
    """Answers decoded at once on a data-parallel rank; the others wait (0: what suits the CPU, or fits the GPU)."""


@dataclass
class PpoTrainingConfig:
    steps: int = 100
    """Rollout batches."""
    rollout_batch_size: int = 64
    """Prompts per rollout batch, over all data-parallel ranks."""
    mini_batch_size: int = 64
    """Rows per optimizer step, over all data-parallel ranks; divides rollout_batch_size."""
    max_tokens_per_micro_batch: int = 8192
    """Tokens per training forward and backward on one rank; rows are packed end to end, without padding."""
    max_tokens_per_score_micro_batch: int = 16384
    """Tokens per scoring forward on one rank."""
    epochs: int = 1
    """Passes over each rollout batch."""
    critic_warmup_steps: int = 0
    """First rollout batches that train the critics only."""
    kl_coeff: float = 0.02
    """β: weight of log π_θ - log π_ref in token rewards and costs."""
    clip_ratio: float = 0.2
    """ε of the clipped surrogate."""
    importance_cap: float | None = None
    """Weigh each token of the actor's loss with min(π_old / π_rollout, this), π_old from one more forward of the actor
    (default: the rollout's log-probabilities are π_old)."""
    clip_value: float = 5.0
    """How far values may move from the rollout's before the value loss is clipped."""
    score_clip: float = 50.0
    """Token rewards and costs are clipped to ± this."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """λ_GAE."""
    loss_reduction: Literal["sequence", "token"] = "sequence"
    """Mean per sequence, then over the batch (the authors' code), or over all tokens."""
    whiten_advantages: bool = False
    """Shift and scale the mixed advantages to mean 0, variance 1 over the rollout batch."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of an answer cut off without EOS."""
    ptx_coeff: float = 0.0
    """γ_ptx: weight of the SFT loss on demonstrations added to the actor's loss."""
    red_team_share: float | None = None
    """Share of each rollout batch drawn from prompts marked red_team (default: as they come)."""
    shaping_coeff: float = 1.0
    """ν of ppo-reward-shaping: the advantage is (Â_r - ν Â_c) / (1 + ν)."""


@dataclass
class LagrangeConfig:
    lambda_init: float = 1.0
    """First λ."""
    lambda_min: float = 1e-4
    """Floor of λ: its step is proportional to itself, so a λ near zero cannot come back."""
    lambda_max: float = 5.0
    """Cap of λ."""
    lambda_lr: float = 0.1
    """α of ln λ <- ln λ + α λ (J_C - threshold)."""
    threshold: float = 0.0
    """Limit on the expected episode cost, in the cost model's units."""
    episode_cost_window: int = 128
    """J_C is the mean of the last this many episode costs over all ranks."""
    update_delay_steps: int = 0
    """Rollout batches before λ moves."""
    prompts: Literal["all", "red-team"] = "all"
    """Whose episode costs count: over a mixture the benign prompts hide the harm."""


@dataclass
class GenerateDataConfig:
    prompts: list[str | dict[str, Any]] = field(default_factory=list)
    """Prompts. Each entry is a path (JSONL of our own form) or {path, source, split, question}."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that is not as its source describes ends the run, or is left out and counted."""
    batch_size: int = 256
    """Prompts generated at a time, over all data-parallel ranks."""
    samples_per_prompt: int = 1
    """Answers to each prompt."""


@dataclass
class RedTeamingConfig:
    templates: str | None = None
    """JSON file of attack templates (default: those that come with this package)."""
    pool: list[str] = field(default_factory=list)
    """JSONL files of the prompts used so far; they stand before the new ones in OUT/prompts.jsonl."""
    threshold: float = 0.0
    """An attack has succeeded when the mean cost of the answers to it is above this."""
    keep: int = 0
    """Keep at most this many attacks (0: all that succeeded and are not too alike)."""
    max_per_seed: int = 2
    """Keep at most this many attacks with the same seed prompt (0: any number)."""
    max_similarity: float = 0.8
    """Leave out an attack that shares more than this of its words and pairs of words with one that is kept; what most
    attacks share, such as a template's own words, counts little."""


@dataclass
class ScoreDataConfig:
    answers: list[str] = field(default_factory=list)
    """JSONL files of {"prompt", "response"}."""
    turns: Literal["last", "all"] = "last"
    """Which of the assistant's turns in a dialogue get scores: the response, or those in its history too, each as the
    end of what came before it."""
    batch_size: int = 256
    """Rows scored at a time, over all data-parallel ranks."""
    max_length: int = 512
    """Longest prompt + answer in tokens."""


@dataclass
class CertificateConfig:
    harmful_rate: float | None = None
    """Exit with code 1 unless at most this share of red-team prompts answered harmfully can be promised (short:
    --require-harmful-rate)."""
    mean_cost: float | None = None
    """Exit with code 1 unless at most this mean cost over the red-team prompts can be promised, in the cost model's
    units (short: --require-mean-cost)."""
    confidence: float = 0.95
    """Confidence of each promise's one-sided bound (short: --confidence)."""
    policy: str | None = None
    """The policy that is to keep the limits, by its name in `policies` (default: the last)."""


@dataclass
class EndpointConfig:
    """A language model behind an OpenAI-compatible chat endpoint."""

    url: str = "https://api.openai.com/v1"
    """Address up to `/v1`, without a key in it."""
    model: str = ""
    """The model's name there."""
    key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key (null: the server needs none). Never the key itself."""
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    """What else each request holds; max_tokens or max_completion_tokens must be there, the budget is kept by it."""
    input_price: float | None = None
    """Dollars per million input tokens (0: a server of your own)."""
    output_price: float | None = None
    """Dollars per million output tokens."""
    max_dollars: float = 10.0
    """No request is made that could bring the cost of all replies in the cache above this."""
    max_parallel: int = 8
    """Requests at a time."""
    timeout_seconds: float = 60.0
    """A request without a reply for this long is made again."""
    retries: int = 6
    """How often one request is made again after failures before the run ends."""
    backoff_seconds: float = 1.0
    """First wait between two tries, on average; doubles each time, up to 60 times itself."""
    cache: str | None = None
    """JSON Lines file of all replies (default: judge.jsonl in the run folder); one job at a time."""


@dataclass
class PeopleConfig:
    """Labels that people gave beforehand."""

    labels: list[str] = field(default_factory=list)
    """JSONL files of comparisons with labels, matched to answers by text."""


@dataclass
class ProgramConfig:
    """A program of yours, which is run: use only what you trust."""

    path: str = ""
    """`path/to/file.py:name`: a function of answers, or a class with `judge` and perhaps `compare`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function or class."""


@dataclass
class JudgeConfig:
    """Who says how helpful and how harmful an answer is."""

    kind: Literal["models", "endpoint", "people", "program"] = "models"
    """`models`: the stage's reward and cost model; the others have a section of their own here."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    people: PeopleConfig = field(default_factory=PeopleConfig)
    program: ProgramConfig = field(default_factory=ProgramConfig)
