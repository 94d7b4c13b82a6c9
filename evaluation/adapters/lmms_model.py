"""VL-GPT as a model of lmms-eval.

    python -m lmms_eval --model vlgpt --model_args export=EXPORT,prompts=vlgpt-i --tasks vqav2_val --batch_size 8

Prompts are the task's own words (that is lmms-eval's protocol), so scores differ from evaluation.run's. Its
few-shot sampler joins texts only: use evaluation.run for few-shot numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from evaluation.adapters import prompt_of
from evaluation.core import DecodeSettings, Prompt, Record, Responder
from evaluation.responders import ModelResponder
from vlgpt.errors import UserError

GREEDY = DecodeSettings(max_new_tokens=64, images="never")
Visuals = Callable[[Record], Sequence[Image.Image] | None]


class VlGptLmms(lmms):
    """Args: export: export folder; prompts: vlgpt-i asks in a user turn, vlgpt lets the model go on with a text."""

    is_simple = True

    def __init__(
        self,
        export: str = "",
        *,
        prompts: str = "vlgpt-i",
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str = "float32",
        responder: Responder | None = None,
        **unused: object,
    ) -> None:
        super().__init__()
        if unused:
            raise UserError(
                f"vlgpt does not know the model_args {sorted(unused)}; valid: export, prompts, dtype"
            )
        if responder is None and not export:
            raise UserError("vlgpt needs --model_args export=FOLDER (made with `vlgpt export`)")
        self.is_chat = prompts != "vlgpt"
        self.batch_size = int(batch_size)
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._device = device or "cpu"
        self.responder = responder or ModelResponder.load(Path(export), device=self._device, dtype=dtype)

    @property
    def device(self) -> str:
        return self._device

    def _prompt(
        self, context: str, doc_to_visual: Visuals | None, doc_id: int, task: str, split: str
    ) -> Prompt:
        document = self.task_dict[task][split][doc_id]
        images = list(doc_to_visual(document) or ()) if doc_to_visual is not None else []
        text = context.replace("<image>", " ")
        return prompt_of([*images, text], is_chat=self.is_chat, id=f"{task}/{split}/{doc_id}")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Replies in the order of the requests; requests of equal settings are answered together."""
        groups: dict[DecodeSettings, list[int]] = {}
        prompts = []
        for number, request in enumerate(requests):
            context, settings, *where = request.args
            prompts.append(self._prompt(context, *where))
            groups.setdefault(decoding_of(settings), []).append(number)
        replies = [""] * len(prompts)
        for decoding, numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                texts = self.responder.generate([prompts[i] for i in batch], decoding)
                for number, text in zip(batch, texts):
                    replies[number] = text.strip()
        return replies

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation (with the end of the reply), and whether greedy decoding gives it."""
        results = []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][doc_id])
            prompt = self._prompt(context, doc_to_visual, doc_id, task, split)
            (score,) = self.responder.rank(prompt, [str(continuation).strip()], normalise="sum")
            (greedy,) = self.responder.generate([prompt], GREEDY)
            results.append((float(score), greedy.strip() == str(continuation).strip()))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises NotImplementedError: multi-round tasks are not supported."""
        raise NotImplementedError("vlgpt answers single rounds; multi-round tasks are not supported")


def decoding_of(settings: Record) -> DecodeSettings:
    """lmms-eval's generation_kwargs (names of transformers) -> our decode settings."""
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    is_sampled = bool(settings.get("do_sample", False)) or float(settings.get("temperature") or 0) > 0
    return replace(
        GREEDY,
        max_new_tokens=int(settings.get("max_new_tokens") or 128),
        num_beams=int(settings.get("num_beams") or 1),
        temperature=float(settings.get("temperature") or 1.0) if is_sampled else 0.0,
        top_p=float(settings.get("top_p") or 1.0) if is_sampled else 1.0,
        length_penalty=float(settings.get("length_penalty") or 0.0),
        stop=tuple(text for text in stop if text),
    )
