"""The `data` section of the config: where prompts come from, and how a row becomes one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sfpo_megatron.config.fields import FieldError, at_least, known, positive, within
from sfpo_megatron.config.reward import WeightedReward, check_choice
from sfpo_megatron.plugins import REWARD, SOURCE

_MAPPED = ("prompt", "answer", "system", "metadata")
_OURS = (  # arguments of apply_chat_template that are no variables of a template
    *("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
)


@dataclass(kw_only=True, frozen=True, slots=True)
class DataSource:
    """One source of prompts."""

    source: Annotated[str, SOURCE]
    """reasoning_gym: a seeded generator; jsonl, parquet, hf (a data set of Hugging Face): rows with
    `prompt` and `answer`, or with the columns of verl, slime, OpenRLHF or NeMo-RL."""
    task: str | None = None
    """reasoning_gym: the generator's name, such as chain_sum."""
    args: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: the generator's settings; your own source: whatever it reads here."""
    size: int | None = None
    """reasoning_gym: problems to make; else rows to take (null for all)."""
    path: str | None = None
    """jsonl (also .gz), parquet: a file, a directory or a glob; hf: a directory that save_to_disk
    wrote, or a name on the hub; your own source: whatever it reads."""
    config: str | None = None
    """hf: the data set's configuration, such as `main`."""
    split: str | None = None
    """hf: the split, such as `train`; null where there is one alone."""
    columns: dict[str, str] = field(default_factory=dict)
    """The source's own names of `prompt`, `answer`, `system` and `metadata`; dots lead into
    objects (`answer: reward_model.ground_truth`)."""
    reward: Annotated[str, REWARD] | tuple[WeightedReward, ...] | None = None
    """Scores the responses to this source's prompts; null for reward.function."""
    weight: float = 1.0
    """How often the source's prompts are drawn, relative to other sources: an epoch has all prompts
    of the heaviest, half of those of a source of half that weight, the other half in the next."""

    def __post_init__(self) -> None:
        known(self, SOURCE, "source")
        check_choice(self, "reward")
        at_least(self, 1, "size")
        positive(self, "weight")
        files = ("path",)
        needed = {"reasoning_gym": ("task", "size"), "jsonl": files, "parquet": files, "hf": files}
        for name in needed.get(self.source, ()):
            if getattr(self, name) is None:
                raise FieldError(name, None, f"a value for source {self.source}", f"set {name}")
        for name in ("config", "split"):
            if getattr(self, name) is not None and self.source != "hf":
                found = getattr(self, name)
                raise FieldError(name, found, f"null with source {self.source}", f"remove {name}")
        if self.columns and self.source == "reasoning_gym":
            raise FieldError("columns", self.columns, "none: its rows are made", "remove it")
        for name in self.columns:
            if name not in _MAPPED:
                fix = "write `prompt: YOUR_NAME`, not `YOUR_NAME: prompt`"
                raise FieldError("columns", name, f"one of {', '.join(_MAPPED)}", fix)
        named = {"prompt": "prompt", "answer": "answer"} | self.columns if self.columns else {}
        texts = [named[name] for name in ("prompt", "answer", "system") if name in named]
        if len(set(texts)) < len(texts):
            expected = "a column each for prompt, answer and system"
            raise FieldError("columns", self.columns, expected, "correct the names")


@dataclass(kw_only=True, frozen=True, slots=True)
class DataConfig:
    """Prompts to train and to evaluate on; a question of `eval` is never trained on."""

    train: tuple[DataSource, ...]
    """Mixed, shuffled by the run's seed, repeated when used up."""
    eval: tuple[DataSource, ...] = ()
    """Held-out prompts."""
    chat_template: bool = False
    """Wrap each prompt as a user message in the tokenizer's chat template."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking: false."""
    system_prompt: str = ""
    """The system message of every row that has none of its own."""
    prompt_prefix: str = ""
    """Put before every question, worked examples for instance."""
    prompt_suffix: str = ""
    """Appended to every prompt's text."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Rows that cannot be used (malformed, too long, a reference that the reward cannot read): end
    with a report of them, or skip and count them."""
    skip_zero_variance: bool = False
    """Skip a prompt with a probability that grows with the number of its last groups whose rewards
    were all equal (GRESO, arXiv 2506.02177). No prompt leaves the data."""
    zero_variance_target: float = 0.25
    """Share of such groups that skip_zero_variance aims at, among those generated; a third of it
    for solved prompts, two thirds for failed ones."""

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "zero_variance_target")
        if not self.train:
            raise FieldError("train", [], "at least one source", "add a source under data.train")
        for name in self.chat_template_args:
            if name in _OURS:
                expected = "a variable of the chat template"
                raise FieldError("chat_template_args", name, expected, "remove it")
        if self.chat_template_args and not self.chat_template:
            raise FieldError(
                "chat_template_args",
                self.chat_template_args,
                "none without a chat template",
                "set data.chat_template=true",
            )
