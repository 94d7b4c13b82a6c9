"""Options that several commands of data_prep have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vlgpt.options import Argument, Options

if TYPE_CHECKING:
    from vlgpt.tokens import DocumentTokenizer

Folders = Annotated[tuple[Path, ...], Argument(is_positional=True, metavar="DIR")]


class TokenizerOptions(Options):
    """The tokenizer that training uses."""

    tokenizer: str | None = Field(None, description="tokenizer folder or hub name of the run")
    template: str = Field("vlgpt", description="chat template of the run, own: the tokenizer's")

    def load_tokenizer(self) -> DocumentTokenizer | None:
        """None without --tokenizer. Raises UserError."""
        if self.tokenizer is None:
            return None
        from vlgpt.tokens import DocumentTokenizer

        return DocumentTokenizer.load(self.tokenizer, template=self.template)
