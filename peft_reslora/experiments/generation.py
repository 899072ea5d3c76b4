"""Generation: prompts are completed; the number that a completion means counts, or its characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from peft_reslora.experiments.arithmetic import plain_numbers, same_number, value_of
from peft_reslora.experiments.data import Data, Row, Split, load_data
from peft_reslora.experiments.hub_base import reading_base
from peft_reslora.experiments.pretraining import pretrained
from peft_reslora.experiments.provenance import fingerprint
from peft_reslora.experiments.settings import BaseSettings, DataSettings, TrainSettings
from peft_reslora.experiments.task import Batch, Example, Task

IGNORED = -100  # what transformers leaves out of the loss
_BATCH = 50

Prompt = str | list[int]
"""A text, or the ids of one that is encoded."""


def generation_task(settings: TrainSettings) -> Task:
    """Read the data, load or pretrain the base, and encode the training rows; the loss counts completions only.

    Raises:
        ValueError: for bad data, with file, row and column.
    """
    columns = [*settings.data.text, settings.data.label, settings.data.answer or settings.data.label]
    data = load_data(settings.data, columns)
    metric, score = _metric(settings.data, data)
    base, tokenizer, held_out = load_generation_base(settings.base)
    if settings.data.chat_template:
        set_template(tokenizer, settings.data)
    check_lengths(data, base, tokenizer, settings.data)
    train = encode_pairs(data.splits["train"], tokenizer, settings.data, settings.training)
    if settings.data.chat_template:  # a template may write the day's date: such a run does not go on tomorrow
        data = replace(data, checksums={**data.checksums, "chats": fingerprint([row["input_ids"] for row in train])})
    if settings.training.get("packing"):
        from peft_reslora.experiments.sft import check_packing

        check_packing(base, train)

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        prompts = prompts_of(data.splits[split], tokenizer, settings.data)
        texts = complete(model, tokenizer, prompts, settings.data.new_tokens)
        return {metric: score(texts, split)}

    def forgetting(model: nn.Module) -> float:
        return text_loss(model, tokenizer, held_out, settings.data.max_length)

    collate = completion_collator(int(tokenizer.pad_token_id))
    return Task(
        settings.task, metric, base, data, train, collate, evaluate, forgetting if held_out else None, tokenizer
    )


def _metric(settings: DataSettings, data: Data) -> tuple[str, Callable[[Sequence[str], str], float]]:
    """How completions of a split are scored: by the number they mean, or by their characters."""
    if settings.match == "characters":
        texts = {name: [str(row[settings.label]) for row in split.rows] for name, split in data.splits.items()}
        return "characters", lambda found, name: mean_of(map(same_characters, found, texts[name]))
    wanted = {name: answers(split, settings.answer or settings.label) for name, split in data.splits.items()}
    return "exact_match", lambda found, name: mean_of(map(same_number, found, wanted[name]))


def mean_of(values: Iterable[float]) -> float:
    """The mean in percent."""
    listed = list(values)
    return 100 * sum(listed) / len(listed)


def same_characters(text: str, wanted: str) -> float:
    """Share of the wanted characters that stand at their place."""
    return sum(a == b for a, b in zip(text, wanted, strict=False)) / len(wanted)


def answers(split: Split, column: str) -> list[float]:
    """The wanted numbers.

    Raises:
        ValueError: naming file, row and column of a cell without a number.
    """
    found = []
    for index, row in enumerate(split.rows):
        if (value := value_of(str(row[column]))) is None:
            raise ValueError(f"{split.place(index, column)}: {str(row[column])[:40]!r} holds no number.")
        found.append(value)
    return found


def load_generation_base(settings: BaseSettings) -> tuple[nn.Module, PreTrainedTokenizerBase, list[str]]:
    """A base pretrained here, or one with a name; of that nothing is known that it could forget."""
    if settings.pretrain is not None:
        return pretrained(settings, settings.pretrain)
    if settings.name is None:
        raise ValueError("base: a language model built in code needs pretrain, what it learns first.")
    quantized = {"quantization_config": four_bits(settings)} if settings.load_in_4bit else {}
    with reading_base(settings.name):
        tokenizer = AutoTokenizer.from_pretrained(settings.name)
        base = AutoModelForCausalLM.from_pretrained(settings.name, dtype=settings.dtype, **quantized)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return base, tokenizer, []


def four_bits(settings: BaseSettings) -> BitsAndBytesConfig:
    """QLoRA's: 4-bit NormalFloat, whose constants are quantized too (arXiv 2305.14314, section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=settings.dtype,
    )


def prompt_of(settings: DataSettings, row: Row) -> str:
    """The text columns as sentences, and a line end."""
    return plain_numbers(". ".join(str(row[column]).strip().rstrip(".") for column in settings.text)) + "\n"


def prompts_of(split: Split, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[Prompt]:
    """What is completed; of chats the ids."""
    texts = [prompt_of(settings, row) for row in split.rows]
    return [chat_ids(tokenizer, settings, text) for text in texts] if settings.chat_template else [*texts]


def check_lengths(data: Data, base: Any, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
    """Refuse what is longer than the model has positions, before hours of training.

    Raises:
        ValueError: for `max_length`, or the first row to be completed that is too long: file, row and column.
    """
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is None:
        return
    if settings.max_length > limit:
        raise ValueError(f"data.max_length={settings.max_length} is more than the {limit} tokens the model takes.")
    for split in (split for name, split in data.splits.items() if name != "train"):
        for index, prompt in enumerate(prompts_of(split, tokenizer, settings)):
            tokens = len(_ids(tokenizer, prompt, start=True) if isinstance(prompt, str) else prompt)
            if tokens + settings.new_tokens > limit:
                raise ValueError(
                    f"{split.place(index, settings.text[0])}: {tokens} tokens and data.new_tokens="
                    f"{settings.new_tokens} are more than the {limit} that the model takes; take the row out."
                )


def encode_pairs(
    split: Split, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, training: Mapping[str, Any] | None = None
) -> list[Example]:
    """Ids of prompt and completion with their labels; with `completion_only_loss: false` those of the prompt too.

    Raises:
        ValueError: for the first row longer than `max_length`: cutting it would cut off what is to be learned.
    """
    encode = chat_pair if settings.chat_template else plain_pair
    only_completion = (training or {}).get("completion_only_loss", True)
    rows = []
    for index, row in enumerate(split.rows):
        prompt, completion = encode(tokenizer, settings, row)
        if len(prompt) + len(completion) > settings.max_length:
            raise ValueError(
                f"{split.place(index, settings.label)}: {len(prompt) + len(completion)} tokens with the prompt, more "
                f"than data.max_length={settings.max_length}; raise it."
            )
        before = [IGNORED] * len(prompt) if only_completion else prompt
        rows.append({"input_ids": prompt + completion, "labels": before + completion})
    return rows


def plain_pair(tokenizer: PreTrainedTokenizerBase, settings: DataSettings, row: Row) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the completion with the token that ends it."""
    completion = _ids(tokenizer, plain_numbers(str(row[settings.label])))
    return _ids(tokenizer, prompt_of(settings, row), start=True), [*completion, tokenizer.eos_token_id]


def chat_pair(tokenizer: PreTrainedTokenizerBase, settings: DataSettings, row: Row) -> tuple[list[int], list[int]]:
    """The same as the template of a chat writes it, up to the token that ends the assistant's turn."""
    answer = {"role": "assistant", "content": plain_numbers(str(row[settings.label]))}
    return turn_ids(tokenizer, settings, [_question(prompt_of(settings, row)), answer])


def turn_ids(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, turns: Sequence[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Ids up to where the last turn begins, which is the assistant's, and its own up to the token that ends it.

    Raises:
        ValueError: if the template writes the conversation in another way than its beginning.
    """
    before, whole = _written(tokenizer, settings, turns[:-1], begin=True), _written(tokenizer, settings, turns)
    if whole[: len(before)] != before:
        raise ValueError(
            f"data.chat_template: the template of {tokenizer.name_or_path} writes a turn that ends in another way "
            "than one that begins; set data.chat_template_kwargs (such as {enable_thinking: false}), or leave "
            "chat_template out."
        )
    completion = whole[len(before) :]
    special = {*tokenizer.all_special_ids}
    last = max((i for i, token in enumerate(completion) if token in special), default=None)
    return before, [*completion, tokenizer.eos_token_id] if last is None else completion[: last + 1]


def chat_ids(tokenizer: PreTrainedTokenizerBase, settings: DataSettings, prompt: str) -> list[int]:
    """Ids of a conversation up to where the assistant begins."""
    return _written(tokenizer, settings, [_question(prompt)], begin=True)


def _question(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt.rstrip("\n")}


def _written(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, turns: Sequence[dict[str, str]], begin: bool = False
) -> list[int]:
    text = tokenizer.apply_chat_template(
        list(turns), tokenize=False, add_generation_prompt=begin, **settings.chat_template_kwargs
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def set_template(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
    """Give the tokenizer the template of the settings, if they have one; refuse it where there is none at all.

    Raises:
        ValueError: naming the tokenizer.
    """
    if isinstance(settings.chat_template, str):
        tokenizer.chat_template = settings.chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"data.chat_template: the tokenizer {tokenizer.name_or_path} has no chat template; take a base that was "
            "trained to chat, give a template in place of true, or leave chat_template out."
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, start: bool = False) -> list[int]:
    begin = [tokenizer.bos_token_id] if start and tokenizer.bos_token_id is not None else []
    return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def completion_collator(pad: int) -> Any:
    """Pads on the right; padding is no part of the loss."""

    def collate(rows: list[Example]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        missing = [longest - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor([row["input_ids"] + [pad] * m for row, m in zip(rows, missing, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - m) + [0] * m for m in missing]),
            "labels": torch.tensor([row["labels"] + [IGNORED] * m for row, m in zip(rows, missing, strict=True)]),
        }

    return collate


def complete(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], new_tokens: int
) -> list[str]:
    """Greedy completions, in batches of prompts of about the same length; in the order of the prompts.

    Those of prompts that are ids, as of a chat, end with the first special token, such as that which ends a turn.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        found = _complete(model, tokenizer, [prompts[i] for i in chosen], new_tokens)
        for index, text in zip(chosen, found, strict=True):
            texts[index] = text
    model.train(was_training)
    return texts


def _complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], new_tokens: int) -> list[str]:
    encoded = [_ids(tokenizer, prompt, start=True) if isinstance(prompt, str) else prompt for prompt in prompts]
    longest = max(map(len, encoded))
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ends = {} if isinstance(prompts[0], str) else {"eos_token_id": tokenizer.all_special_ids}
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    with torch.no_grad():
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, **ends
        )
    return list(tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True))


def text_loss(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> float:
    """Mean cross-entropy of the next token over texts cut at `length`."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:length]], device=device)
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    model.train(was_training)
    return total / tokens
