"""Train a SentencePiece vocabulary on both sides of training rows and save it as a T5 tokenizer.

    python scripts/train_tokenizer.py --dataset_name debian_de_en --output_dir save/tokenizer
    python scripts/train_tokenizer.py --task summarization --train_file rows.csv --source_column text \
        --target_column title --vocab_size 4096 --output_dir save/tokenizer

Data flags are those of run.py.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.data_arguments import LEAVE_IT_OUT, DataArguments, refuse_flags_of_run
from util.flag_help import answer_help
from util.script_arguments import TokenizerArguments

if __name__ == "__main__":
    answer_help((TokenizerArguments, DataArguments), __doc__)  # before torch is imported

import sentencepiece
from transformers import T5Tokenizer

from models.errors import UserError
from util.console import command
from util.data.examples import dataset_record, load_examples
from util.files import locked_output_dir
from util.flags import parse_groups

OF_PROMPTS = ("prompt_template", "use_chat_template", "num_shots", "shot_seed")
UNREAD = dict.fromkeys((*OF_PROMPTS, "num_beams", "drop_long_samples"), LEAVE_IT_OUT)

LENGTH = 4192  # bytes of a line beyond which SentencePiece leaves it out unless told otherwise
RESERVED = "\u2585"  # a line that holds SentencePiece's own mark of the unknown is left out as well


def main(argv: list[str] | None = None) -> None:
    with command():
        flags, data = parse_groups((TokenizerArguments, DataArguments), __doc__, argv)
        refuse_flags_of_run(data, limits="all training rows count", **UNREAD)
        with locked_output_dir(Path(flags.output_dir)) as folder:
            data.report_dir = flags.output_dir
            train(flags, data, folder)


def train(flags: TokenizerArguments, data: DataArguments, folder: Path) -> None:
    """Write `spiece.model` and the tokenizer made from it, and from nothing else, into a folder."""
    rows = load_examples(dataset_record(data), data, "train")
    texts = [text for row in rows for text in (row["source"], row["target"])]
    with TemporaryDirectory(
        prefix=".", dir=folder
    ) as empty:  # a tokenizer.json beside it would be read instead
        pieces = Path(empty, "spiece.model")
        pieces.write_bytes(train_pieces(texts, flags.vocab_size))
        tokenizer = T5Tokenizer.from_pretrained(empty, extra_ids=0, model_max_length=512)
        pieces.replace(folder / pieces.name)
    tokenizer.save_pretrained(folder)
    print(
        f"Wrote a tokenizer of {len(tokenizer)} pieces to {folder}. Next: run.py --do_train --tokenizer_name "
        f'{folder} --config_name FILE, with "vocab_size": {flags.vocab_size} in that file'
    )


def train_pieces(texts: list[str], vocab_size: int) -> bytes:
    """The content of a `.model`, with T5's order of special tokens.

    Raises:
        UserError: the texts have too few pieces.
    """
    model = io.BytesIO()
    lines = [line for text in texts for line in text.replace(RESERVED, " ").splitlines()]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=max([LENGTH, *(len(line.encode()) for line in lines)]),
            character_coverage=0.9998,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--vocab_size {vocab_size} does not suit these texts: {reason(error)}") from error
    return model.getvalue()


def reason(error: RuntimeError) -> str:
    """What SentencePiece says, without its place in the source code."""
    return re.sub(r"^.*\] ", "", " ".join(str(error).split()))


if __name__ == "__main__":
    main()
