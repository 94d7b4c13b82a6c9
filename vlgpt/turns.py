"""Chat templates, and the token ids that one puts around the turns of a chat.

A template is a jinja text, as transformers keeps it in `tokenizer.chat_template`. Packing and interleaving need more
than its whole rendering: the ids before, between and after the turns, so that turns can be tokenised one by one. `cut`
finds them by rendering dialogues and looking for what was said; a template whose rendering is not made of such fixed
ids is refused with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import jinja2

from vlgpt.document import TextPlace
from vlgpt.errors import UserError

Ids = tuple[int, ...]
OWN = "own"  # the name of the template that the tokenizer brings

SYSTEM_MESSAGE = (  # paper, appendix, Table 6
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature."
)
VICUNA_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The text around the turns of a chat.

    {bos} is what the tokenizer puts before a text, {eos} its EOS token, {space} what a first word needs after these to
    be the token that it is in a text of its own: sentencepiece put a space before it when the model was trained.
    """

    first: str  # before what the user says first
    user: str  # before what the user says later
    user_end: str  # after it
    assistant: str  # before a reply
    end: str  # after a reply

    @property
    def bare(self) -> frozenset[TextPlace]:
        """Where what is said follows without a space."""
        before: dict[TextPlace, str] = {"first": self.first, "user": self.user, "assistant": self.assistant}
        return frozenset(place for place, text in before.items() if not text.endswith(" "))

    def jinja(self, *, bos: str, eos: str, space: str) -> str:
        """The template as transformers wants it."""
        reply = self.user_end + self.assistant
        texts = {"first": self.first, "user": self.user, "user_end": self.user_end, "end": self.end}
        texts |= {"reply": reply, "prompt": reply.rstrip(" ")}
        known = {"{bos}": bos, "{eos}": eos, "{space}": space}
        result = ""
        for name, text in texts.items():
            for mark, value in known.items():
                text = text.replace(mark, value)
            result += f"{{% set {name} = {json.dumps(text)} %}}"
        return result + LOOP


LOOP = (
    "{% for message in messages %}"
    "{% if message.role != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('wanted are turns of user and assistant; the system message is fixed') }}{% endif %}"
    "{% if message.role == 'assistant' %}{{ reply + message.content + end }}"
    "{% else %}{{ (first if loop.first else user) + message.content }}"
    "{% if loop.last %}{{ prompt if add_generation_prompt else user_end }}{% endif %}{% endif %}{% endfor %}"
)

TEMPLATES: dict[str, ChatTemplate] = {
    # PAPER: not stated how turns are joined (table 6 gives the words); here as Vicuna 1.1 joins them
    "vlgpt": ChatTemplate(
        f"{{bos}}{{space}}{SYSTEM_MESSAGE} USER: ", "{space}USER: ", "", " ASSISTANT: ", "{eos}"
    ),
    "short": ChatTemplate("{bos}{space}USER: ", "{space}USER: ", "", " ASSISTANT: ", "{eos}"),
    "vicuna": ChatTemplate(  # FastChat, vicuna_v1.1
        f"{{bos}}{{space}}{VICUNA_MESSAGE} USER: ", "{space}USER: ", "", " ASSISTANT: ", "{eos}"
    ),
    "llama2": ChatTemplate(  # Meta, llama/generation.py
        f"{{bos}}{{space}}[INST] <<SYS>>\n{SYSTEM_MESSAGE}\n<</SYS>>\n\n",
        "{bos}{space}[INST] ",
        " [/INST]",
        " ",
        " {eos}",
    ),
    "chatml": ChatTemplate(
        f"{{bos}}<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>user\n",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
}


@dataclass(frozen=True, slots=True)
class Turns:
    """Token ids around the turns of a chat; text in the places `bare` has no space before it."""

    system: Ids  # before the header of the first user turn
    first: Ids  # that header
    user: Ids  # the header of a later user turn
    user_end: Ids  # after a user turn that nothing follows
    reply: Ids  # between what the user says and the reply
    end: Ids  # closes a reply; predicted
    tail: Ids = ()  # follows the end of the last reply
    bare: frozenset[TextPlace] = field(default_factory=frozenset)


# The strings that exports made before this file were trained with: system, user, user_end, assistant, end.
PARTS = {
    "vlgpt": (SYSTEM_MESSAGE, "USER:", "", "ASSISTANT:", ""),
    "short": ("", "USER:", "", "ASSISTANT:", ""),
    "vicuna": (VICUNA_MESSAGE, "USER:", "", "ASSISTANT:", ""),
    "llama2": (f"<<SYS>> {SYSTEM_MESSAGE} <</SYS>>", "[INST]", "[/INST]", "", ""),
    "chatml": (
        f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>",
        *("<|im_start|>user\n", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>"),
    ),
}


def of_parts(name: str, *, encode: Callable[[str], Ids], bos: Ids, eos: Ids) -> Turns:
    """How chats were rendered before: every string of `PARTS` tokenised on its own, BOS before the chat."""
    system, user, user_end, assistant, end = (encode(text) for text in PARTS[name])
    return Turns(bos + system, user, user, user_end, user_end + assistant, end or eos)


def of_texts(template: ChatTemplate, *, encode: Callable[[str], Ids], bos: Ids, eos: Ids) -> Turns:
    """The ids of a built-in template when every text of it is tokenised on its own.

    For tokenizers that join what is said with the text around it. Nothing is lost, since parts are tokenised on their
    own in training and in use, but `apply_chat_template` of an export may give other tokens.
    """

    def ids(text: str) -> Ids:
        plain = encode(text.replace("{space}", "").replace("{bos}", "").replace("{eos}", "").rstrip(" "))
        return (bos if "{bos}" in text else ()) + plain + (eos if "{eos}" in text else ())

    user_end = ids(template.user_end)
    return Turns(
        system=(),
        first=ids(template.first),
        user=ids(template.user),
        user_end=user_end,
        reply=user_end + ids(template.assistant),
        end=ids(template.end),
        bare=template.bare,
    )


def with_system_message(chat_template: str, message: str) -> str:
    """The template with another default: chats that bring no system message of their own begin with this one.

    It is part of the template, not of the chats: an export carries it, and `apply_chat_template` agrees with training.
    """
    given = "messages and messages[0]['role'] == 'system'"
    default = f"[{{'role': 'system', 'content': {json.dumps(message, ensure_ascii=False)}}}] + messages"
    return f"{{% set messages = messages if {given} else {default} %}}{chat_template}"


# What a template is tried on: every kind of character at both ends of a text.
PROBES = (
    "Tell me more",
    "1984 or 2001",
    "why is that so?",
    "It is (as said) so.",
    "(in brackets)",
    '"quoted words"',
    "\u00e9tude d\u00e9j\u00e0",
    "\u4f60\u597d\u5417",
    "\U0001f642 a smile \U0001f642",
    "two\nlines:",
    "- one\n- two",
    "x = f(y);",
)
PLACES: tuple[TextPlace, ...] = (
    "first",
    "assistant",
    "user",
    "assistant",
    "user",
    "assistant",
)  # of six turns
Gaps = list[Ids]


class Encode(Protocol):
    """The ids of a text that follows without a space (`is_bare`) or with one."""

    def __call__(self, text: str, *, is_bare: bool) -> Sequence[int]: ...


class _Unfit(Exception):
    """Why a template cannot be cut."""


def cut(tokenizer: Any, *, encode: Encode, name: str, bare: frozenset[TextPlace] | None = None) -> Turns:
    """The ids around the turns in the chat template of a transformers tokenizer.

    Rendering with the result is token for token what `apply_chat_template` gives for the probes. `bare` says where text
    follows without a space; it is found out when not given. Raises UserError, with the reason, for a template that
    cannot be rendered turn by turn.
    """
    choices = [] if bare is None else [bare]
    if bare is None:
        places: tuple[TextPlace, ...] = ("first", "user", "assistant")
        choices = [frozenset(chosen) for size in range(4) for chosen in combinations(places, size)]
    try:
        return _Cutter(tokenizer, encode).turns(choices)
    except _Unfit as error:
        others = ", ".join(known for known in TEMPLATES if known != name)
        raise UserError(
            f"chat template {name!r} cannot be used with this tokenizer: {error}; choose another one ({others})"
        ) from error


class _Cutter:
    """Renders probes and looks for what they say."""

    def __init__(self, tokenizer: Any, encode: Encode):
        self.tokenizer, self.encode = tokenizer, encode

    def turns(self, choices: Sequence[frozenset[TextPlace]]) -> Turns:
        self.check_text()
        bare, (head, reply, between, *later, last_reply, last) = self.find_gaps(choices)
        if later != [reply, between]:
            raise _Unfit("it writes later turns differently from the first")
        if last_reply != reply:
            raise _Unfit("it writes the last reply differently from the replies before it")
        user_end: Ids = ()
        for length in (1, 2, 3, 4):
            texts, inside = PROBES[:length], [head, reply, between, reply][:length]
            found = self.gaps(self.render(texts, tokenize=True), texts, bare)
            user_end = found[-1] if length == 1 and found else user_end
            if found != [*inside, user_end if length % 2 else last]:
                raise _Unfit("it writes a turn differently when others follow")
            asking = self.render(texts, asks=True, tokenize=True)
            if length % 2 and self.gaps(asking, texts, bare) != [*inside, reply]:
                raise _Unfit("its generation prompt is not what stands before a reply in a dialogue")
        end = self.end_of(last, between)
        user = between[len(end) :]
        shared = next((n for n in range(min(len(head), len(user)), 0, -1) if head[-n:] == user[-n:]), 0)
        return Turns(
            system=head[: len(head) - shared],
            first=head[len(head) - shared :],
            user=user,
            user_end=user_end,
            reply=reply,
            end=end,
            tail=last[len(end) :],
            bare=bare,
        )

    def render(self, texts: Sequence[str], *, asks: bool = False, **options: Any) -> Any:
        """A dialogue that says these texts in turn, as text or (`tokenize=True`) as ids."""
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
        ]
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=asks, return_dict=False, **options
            )
        except (jinja2.TemplateError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise _Unfit(
                f"it refuses a dialogue of {len(texts)} turns of user and assistant ({reason})"
            ) from error

    def check_text(self) -> None:
        """What is wrong with the template whatever the tokens."""
        texts = PROBES[:6]
        whole = self.render(texts, tokenize=False)
        undated = "{% macro strftime_now(format) %}{% endmacro %}" + self.tokenizer.get_chat_template()
        if whole != self.render(texts, tokenize=False, chat_template=undated):
            raise _Unfit(
                "it writes today's date into the chat, so that a rendering changes from day to day (put a fixed "
                "date in place of strftime_now in chat_template.jinja)"
            )
        at = 0
        for number, text in enumerate(texts):
            if whole.count(text) != 1 or whole.find(text) < at:
                raise _Unfit(
                    f"it leaves out, moves or rewrites what is said in turn {number + 1} of {len(texts)}"
                )
            at = whole.find(text)

    def gaps(self, ids: list[int], texts: Sequence[str], bare: frozenset[TextPlace]) -> Gaps:
        """The ids before, between and after the texts of a dialogue; ends early where a text is not found."""
        found: Gaps = []
        at = 0
        for text, place in zip(texts, PLACES):
            said = list(self.encode(text, is_bare=place in bare))
            begins = (i for i in range(at, len(ids) - len(said) + 1) if ids[i : i + len(said)] == said)
            begin = next(begins, None)
            if begin is None:
                return found
            found.append(tuple(ids[at:begin]))
            at = begin + len(said)
        return [*found, tuple(ids[at:])]

    def find_gaps(self, choices: Sequence[frozenset[TextPlace]]) -> tuple[frozenset[TextPlace], Gaps]:
        """Where text is bare, and the gaps of a dialogue of six turns: the same ones whatever is said."""
        wanted: dict[frozenset[TextPlace], Gaps] = {}
        for shift in range(len(PROBES)):
            texts = [*PROBES[shift:], *PROBES[:shift]][: len(PLACES)]
            ids = self.render(texts, tokenize=True)
            found = {bare: self.gaps(ids, texts, bare) for bare in choices}
            for bare, gaps in found.items():
                if shift == 0 and len(gaps) > len(PLACES):
                    wanted[bare] = gaps
            fitting = [bare for bare, gaps in found.items() if gaps == wanted.get(bare)]
            if not fitting:
                same = [_num_equal(gaps, wanted.get(bare, gaps)) for bare, gaps in found.items()]
                text = texts[min(max(same), len(texts) - 1)]
                raise _Unfit(f"{text!r} makes other tokens together with what stands around it than alone")
            choices = fitting
        return choices[0], wanted[choices[0]]

    def end_of(self, last: Ids, between: Ids) -> Ids:
        """What closes a reply: up to the first control token, or else all that always follows a reply."""
        added = self.tokenizer.added_tokens_decoder.items()
        control = {*self.tokenizer.all_special_ids, *(i for i, token in added if token.content.strip())}
        size = next((n + 1 for n, token in enumerate(last) if token in control), None)
        if size is None:
            size = _num_equal(last, between)
        if last[:size] != between[:size]:
            raise _Unfit("a reply is closed differently at the end of a chat than inside it")
        if not self.tokenizer.decode(list(last[:size])).strip():
            raise _Unfit(
                "nothing but white space closes a reply, so that generation would not know where to stop"
            )
        return last[:size]


def _num_equal(a: Sequence[object], b: Sequence[object]) -> int:
    """How many entries agree from the start."""
    return next((n for n, (left, right) in enumerate(zip(a, b)) if left != right), min(len(a), len(b)))
