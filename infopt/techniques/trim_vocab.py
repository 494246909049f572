"""A smaller vocabulary: tokens that the text at hand never uses go, and with them their rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from pydantic import Field

from infopt.errors import InputError, RecipeError
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from infopt.model.bundle import Bundle

#: Beside the weights: which of the reference's tokens are left.
FILE = "trim_vocab.json"
#: What every report says of a model whose tokens are not its reference's.
REMARK = (
    "its vocabulary is that of its calibration text: other text takes more tokens, so figures per token are not of the "
    "reference's tokens"
)
#: Tokens that any text is cut down to.
BYTES = 256
#: Different tokens in n tokens of prose, families included: FACTOR · n^POWER (Heaps' law); English, a vocabulary of 49,152.
FACTOR, POWER = 19.0, 0.6
#: Seconds per token of the old vocabulary while the tokenizer is written anew; measured.
TOKENIZER_S = 5e-5


class TrimVocabOptions(Options):
    keep: int | None = Field(default=None, ge=BYTES)
    multiple: int = Field(default=64, ge=1)


class TrimVocab(Technique):
    """Drops the tokens that the calibration text never uses, and their rows of the input embedding and the output head.

    Load What You Need (Abdaoui et al., arXiv 2010.05609), for BPE tokenizers. What stays: bytes, special and added tokens,
    those of the chat template, those of the text, and what BPE joins on the way to each of them. So any text can still
    be written, and text of kept tokens is cut into the very same tokens, numbered anew. A word whose token is gone is cut
    into pieces that the model has seldom seen it in, and costs several nats: **calibrate on much text of the kind that it will
    meet**. Nothing is trained. The artifact is a plain model with a smaller tokenizer; `trim_vocab.json` holds the old number
    of every token.

    Of quality, perplexity is of the same text, each lost token read in pieces, while KLD is no figure any more. Later
    steps are calibrated in the new tokens; `distil` comes before it, since its teacher has the old ones.

    keep      tokens of the new vocabulary, ≥ 256: what must stay, then the most frequent of the text, then those of the lowest
              numbers, which BPE learnt first. Default null: all that occur in the text.
    multiple  the vocabulary is rounded up to a multiple of it with tokens of the lowest numbers, as far as there are any, ≥ 1,
              default 64.
    """

    Options = TrimVocabOptions
    needs = Needs(calibration=True)
    keeps_vocabulary = False
    walks = True
    remark = REMARK
    options: TrimVocabOptions

    def check(self, shapes: Shapes, path: str) -> None:
        if shapes.head is None:
            raise RecipeError(path, f"{shapes.architecture} has no output head to take rows from")
        if self.options.keep is not None and self.options.keep >= shapes.vocabulary:
            raise RecipeError(
                f"{path}.keep",
                f"found {self.options.keep}; allowed: {BYTES} … {shapes.vocabulary - 1}, fewer than the model has",
                hint="keep: null keeps what the calibration text uses",
            )

    def reshape(self, shapes: Shapes) -> Shapes:
        """As many rows as `keep` asks for; without it as many as prose of the calibration text's length would leave."""
        rows = self._rows(shapes)
        head = None if shapes.head is None else (rows, shapes.head[1])
        return replace(shapes, vocabulary=rows, head=head, embedding=shapes.embedding // shapes.vocabulary * rows)

    def _rows(self, shapes: Shapes) -> int:
        rows = self.options.keep or BYTES + round(FACTOR * self.calibration_tokens**POWER)
        return min(shapes.vocabulary, -(-rows // self.options.multiple) * self.options.multiple)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import vocabulary
        from infopt.model import bpe

        if not context.calibration_ids:
            raise InputError("trim_vocab needs text", hint="calibration: {text: bundled, samples: 128, tokens: 512}")
        rules = bpe.read(bundle.tokenizer)
        embedding, _ = vocabulary.tables(bundle.model)
        if max(rules.tokens) >= embedding.num_embeddings:
            message = f"{max(rules.tokens) + 1} tokens for an embedding of {embedding.num_embeddings} rows"
            raise InputError(message, hint="the tokenizer is another model's")
        counts = Counter(chain.from_iterable(context.calibration_ids))
        always = (vocabulary.named_ids(bundle.model) & rules.tokens.keys()).union(_template_ids(bundle.tokenizer))
        try:
            kept = bpe.choose(rules, always, counts, self.options.keep, self.options.multiple)
        except InputError as error:
            raise InputError(f"trim_vocab.keep: {error}", hint="raise keep, or leave it out") from None
        context.progress(f"{len(kept)} of {len(rules.tokens)} tokens stay")
        sample = str(bundle.tokenizer.decode(list(context.calibration_ids[0])))
        tokenizer = bpe.trimmed(bundle.tokenizer, rules, kept, bundle.model.config, sample)
        log = {"tokens": len(rules.tokens), "rows": embedding.num_embeddings, "in_text": len(counts), "kept": kept}
        vocabulary.keep_rows(bundle.model, kept)
        return replace(bundle, tokenizer=tokenizer, files={**bundle.files, FILE: json.dumps(log) + "\n"})

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """Exact with `keep`, but for tokenizers with fewer tokens than the model has rows; an estimate without it."""
        after, rate = self.reshape(shapes), machine.read_bytes_per_s
        element = before.weights_bytes / shapes.parameters
        tables = (after.embedding + (0 if after.is_head_tied else after.head_parameters)) * element
        return Prediction(
            weights_bytes=before.weights_bytes - round((shapes.parameters - after.parameters) * element),
            peak_bytes=max(before.peak_bytes, before.weights_bytes + round(tables)),
            seconds=2 * tables / rate + shapes.vocabulary * TOKENIZER_S if rate else None,
        )


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens of the chat template's own words: roles, a system prompt."""
    from infopt.data.prompts import Message, render

    found: set[int] = set()
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user")) if tokenizer.chat_template else ():
        try:
            text = render([Message(role, "") for role in roles], tokenizer, "the chat template", is_open=True)
        except InputError:  # it knows no such role
            continue
        found.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found


TECHNIQUE = TrimVocab
