"""How a decoder-only model is asked: the text around a source, and token ids of questions and answers.

    prompt = Prompt("{source}\\n\\nSummary:")
    asked = [prompt.ask(tokenizer, "A long text.")]
    ids, answers = prompt.encode(tokenizer, asked), prompt.encode_answers(tokenizer, asked, ["Short."])

Answers end in the tokenizer's end token.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from models.errors import UserError

SOURCE = "{source}"
BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """A template with the place of the source, asked plainly or as a message of the tokenizer's chat
    template; `shots` are sources and answers shown before."""

    template: str = SOURCE
    chat: bool = False
    shots: tuple[tuple[str, str], ...] = ()

    def ask(self, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
        """The whole prompt of a source, as text."""
        if self.chat:
            return self._ask_in_chat(tokenizer, source)
        shown = [join(self._fill(shot), answer) for shot, answer in self.shots]
        return BETWEEN_SHOTS.join([*shown, self._fill(source)])

    def _ask_in_chat(self, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
        messages = []
        for shot, answer in self.shots:
            messages += [message("user", self._fill(shot)), message("assistant", answer)]
        messages.append(message("user", self._fill(source)))
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _fill(self, source: str) -> str:
        return self.template.replace(SOURCE, source)

    @property
    def stop(self) -> str | None:
        """What ends an answer besides the end token: a base model goes on with an example of its own after
        it. None without shots, in a chat, or where the answer of a shot holds it."""
        ambiguous = any(BETWEEN_SHOTS in answer for _, answer in self.shots)
        return None if self.chat or ambiguous or not self.shots else BETWEEN_SHOTS

    def answer_length(self, text: str) -> int | None:
        """Characters of what was decoded after a prompt, up to the stop; None if it has not come yet."""
        if self.stop is None:
            return None
        before = self.template.rpartition(SOURCE)[2]  # the stop may begin in it, as `generate` sees it
        start = max(0, len(before) - len(self.stop) + 1)
        found = (before + text).find(self.stop, start)
        return None if found < 0 else max(0, found - len(before))

    def encode(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
        """Ids of prompts: with the start token, if the tokenizer adds one, but no end token after them. A
        chat template brings its own."""
        rows = tokenizer(texts, add_special_tokens=not self.chat, verbose=False).input_ids
        if self.chat:
            return rows
        end = tokenizer.eos_token_id
        return [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]

    def encode_answers(
        self, tokenizer: PreTrainedTokenizerBase, asked: list[str], answers: list[str]
    ) -> list[list[int]]:
        """Ids of answers as they follow those of their prompts, the end token at last."""
        texts = list(map(join, asked, answers))
        found = []
        ids = self.encode(tokenizer, asked), self.encode(tokenizer, texts)
        for start, whole, prompt, text in zip(*ids, asked, texts, strict=True):
            if whole[: len(start)] == start:
                token_ids = whole[len(start) :]
            else:  # a token reaches over the border: the prompt stays as it is at decoding
                rest = text[len(prompt) :]
                token_ids = tokenizer(rest, add_special_tokens=False, verbose=False).input_ids
            found.append([*token_ids, tokenizer.eos_token_id])
        return found


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def join(asked: str, answer: str) -> str:
    """A prompt with its answer, parted by a blank where it ends in none."""
    return f"{asked}{answer}" if asked[-1:].isspace() else f"{asked} {answer}"


def require_chat_template(tokenizer: PreTrainedTokenizerBase, flag: str) -> None:
    """Raise UserError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise UserError(f"{flag}: the tokenizer has no chat template; leave it out for a plain prompt.")
