"""The Processor of a model: messages and images to a Prompt, tokens to text and boxes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact import MANIFEST, Artifact, ModelInfo, open_artifact
from ..opening import reading
from ..soundness import TEMPLATE
from .boxes import Box
from .detokenizer import IncrementalDetokenizer
from .families import Family, family
from .images import Frame
from .prompt import Images, Message, Prompt, Turn, as_list, check_messages, check_text
from .token_bytes import TokenBytes
from .tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Processor:
    """The work of the host before and after the graphs: messages and images to a Prompt, tokens to text and boxes.

    A processor needs no engine, no graphs and no weights. Several threads may use one.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    template: str  # the chat template, in Jinja
    system_in_user: bool = False  # where the template refuses a system message, its text goes to the first user turn

    @classmethod
    def open(cls, folder: str | Path, *, system_in_user: bool = False) -> Processor:
        """The processor of the artifact in a folder; nothing of it stays open. Raises ArtifactError."""
        artifact = open_artifact(Path(folder))
        try:
            return cls.of(artifact, system_in_user=system_in_user)
        finally:
            artifact.close()

    @classmethod
    def of(cls, artifact: Artifact, *, system_in_user: bool = False) -> Processor:
        """The processor of an open artifact; raises ArtifactError naming the file that cannot be used."""
        info, folder = artifact.manifest.model, artifact.path(artifact.manifest.tokenizer)
        with reading(artifact.path(MANIFEST), artifact.folder):
            family(info.family)
        with reading(folder, artifact.folder):
            tokenizer = load_tokenizer(folder, info.tokenizer)
        with reading(folder / TEMPLATE, artifact.folder):
            template = _read_template(folder)
        return cls(info, tokenizer, template, system_in_user)

    @classmethod
    def read(cls, info: ModelInfo, folder: Path) -> Processor:
        """The processor of a model whose tokenizer and chat template lie in `folder`; raises TokenizerError or OSError."""
        return cls(info, load_tokenizer(folder, info.tokenizer), _read_template(folder))

    @functools.cached_property
    def family(self) -> Family:
        """The functions of the model's family; raises ValueError for a family that this runtime does not know."""
        return family(self.info.family)

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token, a table that is made at its first use."""
        return TokenBytes(self.tokenizer)

    def prompt(
        self, messages: Turn | Sequence[Message], images: Images = None, *, add_generation_prompt: bool = True
    ) -> Prompt:
        """The prompt of a conversation through the chat template.

        messages: a list of messages; a text or a Message alone is one turn of the user (see `turn`). images: one image or a
        list of those of all messages, in the order of their image parts. add_generation_prompt: the prompt ends where the
        assistant answers; False where the last message is an answer.

        Raises PromptError, ImageError, TokenizerError, or ChatTemplateError where the template refuses the messages.
        """
        sources = as_list(images)
        is_turn = isinstance(messages, str | Message)
        conversation = [self.turn(messages, len(sources))] if is_turn else check_messages(messages)
        return self.family.chat_prompt(
            *(conversation, sources, self.info, self.tokenizer, self.template),
            add_generation_prompt=add_generation_prompt,
            system_in_user=self.system_in_user,
        )

    def raw_prompt(self, text: str, images: Images = None) -> Prompt:
        """The prompt of a text as it is, image marks and special tokens included, without the chat template.

        Raises PromptError, ImageError or TokenizerError.
        """
        return self.family.raw_prompt(check_text(text), as_list(images), self.info, self.tokenizer)

    def turn(self, text: Turn, images: int) -> Message:
        """A turn of the user with so many images: a Message as it is, or one made of a plain text.

        Images stand first unless the text has a mark for each. Raises PromptError when marks and images differ in number.
        """
        return text if isinstance(text, Message) else Message("user", self.family.parts_of(check_text(text), images, self.info))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(token_ids)

    def detokenizer(self, stops: Sequence[str] = (), from_token: int = 0, *, streamed: bool = False) -> IncrementalDetokenizer:
        """A new detokenizer for one answer; arguments as of IncrementalDetokenizer."""
        return IncrementalDetokenizer(self.tokenizer, stops, from_token, streamed=streamed)

    def boxes(self, text: str, frames: Sequence[Frame]) -> tuple[Box, ...]:
        """The boxes in an answer, in pixels of the prompt's images; `frames` are those of the Prompt."""
        return self.family.parse_boxes(text, frames)


def _read_template(folder: Path) -> str:
    """The chat template beside a tokenizer."""
    return (folder / TEMPLATE).read_text(encoding="utf-8")
