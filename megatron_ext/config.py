"""Every knob, once. Torch-free: flows, tasks and the engine all read their configuration here.

A recipe has five sections, each one class below: ``model``, ``data``, ``train``, ``evaluate``, ``runtime``.
The first four change the result and are hashed into artifact fingerprints; ``runtime`` says only where and
how it runs and is recorded, not hashed. Names are megatron-core's where it has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_ext.errors import ConfigError

Dtype = Literal["bf16", "fp16", "fp32"]
VocabInit = Literal["mean", "zeros", "normal"]
VerifyLevel = Literal["none", "digest", "logits"]
DatasetFormat = Literal["auto", "text", "alpaca", "sharegpt", "messages", "prompt_completion", "preference"]


class Section(BaseModel):
    """Base of all configuration: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UpcycleConfig(Section):
    """A dense model as the start of a mixture of experts: every expert begins as a copy of the layer's MLP."""

    num_experts: int = Field(default=8, ge=2, description="Experts a layer.")
    topk: int = Field(default=2, ge=1, description="Experts a token; their weights are normalised to a sum of 1.")
    router_init_std: float = Field(default=0.02, ge=0, description="Standard deviation of the random router.")
    noise_std: float = Field(
        default=0.0, ge=0, description="Standard deviation of what is added to every expert's weights; 0 copies them."
    )
    seed: int = Field(default=1234, ge=0, description="Seed of router and noise.")

    @model_validator(mode="after")
    def _consistent(self) -> UpcycleConfig:
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} is more than num_experts {self.num_experts}")
        if self.topk == 1:
            raise ValueError("topk 1 is not supported: one expert always has weight 1, so the router could not learn")
        return self


class ModelConfig(Section):
    """Which model to start from."""

    path: str = Field(
        description="Local Hugging Face folder, hub id (needs the network), or demo://NAME, made by the first stage."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit when path is a hub id.")
    dtype: Dtype | None = Field(
        default=None, description="Type of the converted weights; empty keeps each tensor's own."
    )
    extra_vocab_size: int = Field(
        default=0, ge=0, description="Rows that the embedding and the output layer get for tokens that were added."
    )
    extra_vocab_init: VocabInit = Field(
        default="mean", description="Start of those rows: the mean of the old ones, zeros, or normal with their std."
    )
    upcycle: UpcycleConfig | None = Field(default=None, description="Make a mixture of experts of a dense model.")
    verify: VerifyLevel = Field(
        default="digest",
        description="What a conversion and an export must pass before they are published: every tensor compared with "
        "its source (digest), and the logits of both models too (logits).",
    )


class TokenizeOptions(Section):
    """How rows become documents of token ids."""

    format: DatasetFormat = Field(default="auto", description="Shape of a row; auto decides from the rows.")
    chat_template: str | None = Field(
        default=None, description="Named chat template or a Jinja file; empty takes the model's own."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Field that the format reads -> its name in the files, where it differs."
    )
    last_turn_only: bool = Field(default=False, description="Train the last assistant turn alone, not all of them.")
    train_on_prompt: bool = Field(default=False, description="Train the prompt's tokens, too.")
    append_eod: bool = Field(
        default=False, description="End every document with the end-of-sequence token, unless it ends with it already."
    )
    prepend_bos: bool = Field(
        default=False,
        description="Start every document with the beginning-of-sequence token, unless it starts with it already.",
    )
    max_length: int | None = Field(default=None, ge=2, description="Tokens of the longest document; empty: no limit.")
    overlong: Literal["truncate", "drop", "split"] = Field(
        default="truncate",
        description="What happens to a document longer than max_length; counted and reported. split is for text.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="What happens to a row that does not fit; skipped ones are counted and reported."
    )
    slow_tokenizer: bool = Field(default=False, description="Take the Python tokenizer instead of the fast one.")


class DataConfig(TokenizeOptions):
    """What to train on."""

    files: tuple[str, ...] = Field(
        min_length=1,
        description="Files, globs, folders or URLs, each with an optional weight in front (0.7:FILE); or demo://NAME, "
        "demo://NAME/text, demo://NAME/preferences.",
    )
    validation_files: tuple[str, ...] = Field(
        default=(),
        description="Like files, for the validation loss alone: each row is read once, so that weights do not matter. "
        "Instead of train.validation_fraction; not for preferences.",
    )

    def holding(self, format: DatasetFormat) -> DataConfig:
        """The same data where nothing else was said, read as ``format``.

        Raises:
            ConfigError: ``format`` of the recipe is another one; names the flow for it.
        """
        if self.format not in ("auto", format):
            raise ConfigError(
                f"data.format {self.format} does not belong to this flow, which trains on {format}; text: "
                "full-pretrain, preference: full-dpo, conversations: full-sft"
            )
        return self.model_copy(update={"format": format})


def require_multiple(seq_length: int, pack_alignment: int) -> None:
    """Refuse sequences that are no multiple of what each sample takes a multiple of.

    Raises:
        ValueError: names a ``seq_length`` that fits.
    """
    if rest := seq_length % pack_alignment:
        raise ValueError(
            f"seq_length {seq_length} is not a multiple of pack_alignment {pack_alignment}; "
            f"take {seq_length - rest or pack_alignment}, or another pack_alignment"
        )


class PreferenceConfig(Section):
    """How preference training (DPO and its relatives) weighs a pair of answers."""

    loss: Literal["sigmoid", "ipo", "hinge"] = Field(default="sigmoid", description="DPO, IPO, or SLiC's hinge.")
    beta: float = Field(default=0.1, gt=0, description="Strength of the tie to the reference model.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs that are taken to be labelled the wrong way round."
    )
    sft_weight: float = Field(
        default=0.0, ge=0, description="Weight of the chosen answer's mean negative log-likelihood a token."
    )

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss sigmoid; loss is {self.loss}")
        return self


class TrainConfig(Section):
    """What supervised fine-tuning computes. Exactly one of train_iters, train_epochs and train_tokens is given."""

    seq_length: int = Field(default=4096, ge=8, description="Tokens in one packed sequence.")
    global_batch_size: int = Field(
        ge=1, description="Sequences in one optimizer step: packed sequences when packing, else samples."
    )
    train_iters: int | None = Field(default=None, ge=1, description="Optimizer steps.")
    train_epochs: float | None = Field(default=None, gt=0, description="Passes over the dataset.")
    train_tokens: int | None = Field(
        default=None, ge=1, description="Tokens; steps = tokens // (global_batch_size * seq_length)."
    )
    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the last step.")
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = Field(
        default="cosine", description="Shape of the decay."
    )
    lr_warmup_iters: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    lr_warmup_tokens: int | None = Field(
        default=None, ge=0, description="Instead of lr_warmup_iters: tokens // (global_batch_size * seq_length) steps."
    )
    lr_wsd_decay_iters: int | None = Field(default=None, ge=1, description="Steps of the final decay of WSD.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW weight decay (not on biases and norms).")
    adam_beta1: float = Field(default=0.9, gt=0, lt=1)
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0, description="Global gradient norm limit; 0 switches clipping off.")
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        default="bf16",
        description="Arithmetic of forward and backward; main weights and optimizer state stay fp32. fp16 scales the "
        "loss dynamically; fp8 (hybrid, beside bf16) needs Transformer Engine.",
    )
    initial_loss_scale: float = Field(default=65536.0, ge=1, description="fp16: what the loss is multiplied by first.")
    loss_scale_window: int = Field(
        default=1000, ge=1, description="fp16: steps without overflow after which the scale doubles."
    )
    packing: bool = Field(default=True, description="Put several samples into one sequence, attention kept apart.")
    pack_alignment: int = Field(
        default=16,
        ge=1,
        description="Tokens: each sample takes a multiple of these in its sequence, so that sequences do not depend on "
        "context parallelism; what follows its last token trains nothing. Must divide seq_length.",
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the documents that is held out, by the hash of each one's tokens and the seed.",
    )
    overlong: Literal["truncate", "drop"] = Field(
        default="truncate", description="What happens to a sample longer than seq_length; counted and reported."
    )
    loss_normalization: Literal["token", "sequence"] = Field(
        default="token", description="Mean over all trained tokens of a step, or over its samples' means."
    )
    moe_aux_loss_coeff: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the load-balancing loss of a mixture of experts; empty takes the model's own "
        "(router_aux_loss_coef of its config.json), 0 switches it off.",
    )
    moe_z_loss_coeff: float = Field(
        default=0.0, ge=0, description="Weight of the loss that keeps the router's logits small; ST-MoE takes 1e-3."
    )
    preference: PreferenceConfig = Field(
        default=PreferenceConfig(), description="For a dataset of preferences; has no effect on another."
    )
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=1234, ge=0, description="Seed of data order and dropout.")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        given = [n for n in ("train_iters", "train_epochs", "train_tokens") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of train_iters, train_epochs, train_tokens must be given, not {found}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is greater than lr {self.lr}")
        if self.lr_warmup_iters and self.lr_warmup_tokens is not None:
            raise ValueError("lr_warmup_iters and lr_warmup_tokens exclude each other; give one of them")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise ValueError("lr_decay_style WSD needs lr_wsd_decay_iters")
        require_multiple(self.seq_length, self.pack_alignment)
        return self


class EvalConfig(Section):
    """How base and tuned model are scored (lm-eval, Hugging Face backend)."""

    tasks: tuple[str, ...] = Field(min_length=1, description="lm-eval task names.")
    include_path: str | None = Field(
        default=None, description="Folder with local task YAMLs, or demo://NAME; then bundled tasks are not indexed."
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples before the question; empty keeps the task's own."
    )
    limit: int | None = Field(default=None, ge=1, description="Documents a task at most; empty takes all.")
    apply_chat_template: bool = Field(default=True, description="Ask through a chat template.")
    chat_template: str | None = Field(
        default=None,
        description="Named chat template or a Jinja file; empty takes data.chat_template, then the model's own.",
    )
    baseline: bool = Field(default=True, description="Score the base model too.")

    def asked_as(self, chat_template: str | None) -> EvalConfig:
        """The same evaluation, asked through the template that training used, unless it names one itself."""
        return self if self.chat_template else self.model_copy(update={"chat_template": chat_template})


class RuntimeConfig(Section):
    """Where and how it runs. Nothing here changes what is computed, so nothing here is hashed."""

    platform: Literal["auto", "cpu", "cuda", "npu"] = Field(default="auto", description="auto takes what is there.")
    nproc_per_node: int = Field(default=1, ge=1, description="Training processes on this node.")
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads a process; empty shares the cores out."
    )
    micro_batch_size: int = Field(default=1, ge=1, description="Sequences a data-parallel rank computes at once.")
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None, ge=2, description="Chunks of layers that each pipeline stage holds; smaller bubbles, more sends."
    )
    expert_model_parallel_size: int = Field(
        default=1, ge=1, description="Data-parallel ranks that share the experts of a mixture of experts out."
    )
    context_parallel_size: int = Field(
        default=1, ge=1, description="Ranks that share the places of every sequence; for text, or train.packing false."
    )
    sequence_parallel: bool = Field(
        default=False, description="Split norms and dropout along the sequence; needs tensor parallelism."
    )
    make_vocab_size_divisible_by: int = Field(
        default=128,
        ge=1,
        description="The embedding's rows are padded to a multiple of this x tensor_model_parallel_size in training; "
        "padding takes no probability and is never exported.",
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What backward computes again instead of keeping: nothing, attention's inside, or whole layers.",
    )
    recompute_method: Literal["uniform", "block"] = Field(
        default="uniform",
        description="full: groups of recompute_num_layers over all layers, or the first recompute_num_layers layers.",
    )
    recompute_num_layers: int = Field(default=1, ge=1, description="Layers of a group, or of the block, a stage.")
    use_distributed_optimizer: bool = Field(
        default=True, description="Shard the optimizer state over data-parallel ranks (ZeRO-1)."
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="Sum gradients over data-parallel ranks in buckets while backward goes on."
    )
    overlap_param_gather: bool = Field(
        default=False,
        description="Gather what the distributed optimizer updated in buckets while the next forward goes on; needs "
        "overlap_grad_reduce.",
    )
    ddp_bucket_size: int | None = Field(
        default=None, ge=1, description="Parameters of such a bucket; empty takes 40 million, or more on many ranks."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Threads or processes that tokenize; empty takes one for each core."
    )
    save_interval: int = Field(default=500, ge=1, description="Steps between resumable checkpoints.")
    async_save: bool = Field(
        default=False, description="Write resumable checkpoints beside the training, from a copy in main memory."
    )
    keep_last: int = Field(default=1, ge=1, description="Resumable checkpoints that stay while training goes on.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Steps: a checkpoint whose step is a multiple stays for good; empty keeps none."
    )
    keep_final_state: bool = Field(
        default=False,
        description="Keep the optimizer's state of the last step, too, in full_state/; model.finetune false goes on.",
    )
    optimizer_state: Literal["auto", "any_layout", "as_sharded"] = Field(
        default="auto",
        description="How resumable checkpoints hold the optimizer's state. any_layout goes on under other tp, pp and "
        "dp, and is gathered on one data-parallel rank to be saved, 12 bytes for each parameter that the rank holds; "
        "as_sharded goes on under another dp alone; auto: any_layout up to a billion parameters.",
    )
    hang_timeout: int = Field(
        default=1800,
        ge=10,
        description="Seconds without a finished step after which a rank counts as hung; it "
        "writes its stacks into the log and ends, and a rerun goes on from the last checkpoint.",
    )
    eval_interval: int = Field(
        default=500, ge=1, description="Steps between losses on the validation set, if there is one; the last step too."
    )
    log_interval: int = Field(default=10, ge=1, description="Steps between metric records.")
    evaluate_batch_size: int = Field(default=16, ge=1, description="Documents scored at once.")
    grace_seconds: int = Field(default=120, ge=1, description="Time to save after a stop is asked for.")


class TrainingInputs(Section):
    """`model` section of `mflow train CONFIG.yaml`."""

    checkpoint: Path = Field(
        description="Folder that `mflow convert` or `mflow train` wrote, or one iteration in it: DIR/iter_0000500."
    )
    finetune: bool = Field(
        default=True,
        description="Start at step 0 from the weights alone, as Megatron's --finetune; false goes on with the "
        "optimizer, schedule and step of a resumable checkpoint, too: to train longer than was planned.",
    )


class DatasetInputs(Section):
    """`data` section of `mflow train CONFIG.yaml`."""

    validation: Path | None = Field(
        default=None, description="Dataset for the validation loss; or hold some of `dataset` out: validation_fraction."
    )
    reference: Path | None = Field(
        default=None, description="Preference data: log-probabilities of a reference job; empty computes them first."
    )
    dataset: Path = Field(description="Folder that `mflow tokenize` wrote.")


class TrainJobConfig(Section):
    """The file that `mflow train CONFIG.yaml` reads."""

    model: TrainingInputs
    data: DatasetInputs
    train: TrainConfig
    runtime: RuntimeConfig = RuntimeConfig()
    out: Path = Field(description="Folder for checkpoints, metrics.jsonl and TensorBoard files; a rerun resumes there.")


class Recipe(Section):
    """The parameters of every flow that trains."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluate: EvalConfig
    runtime: RuntimeConfig = RuntimeConfig()
