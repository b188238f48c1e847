"""How tests decode: settings, thresholds and policies with scripted exits."""

from __future__ import annotations

from transformers.generation import BaseStreamer

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoding import early_exit_decode
from models.exit_policy import Calm, FullDepth, StaticExit
from models.free import Free
from models.threshold import FixedThreshold

LENGTH = 14
ROWS = 4
# Random models repeat themselves; these settings make the rows of a batch end at different lengths.
MANY_ENDS = {"eos_token_id": list(range(1, 12)), "no_repeat_ngram_size": 1}
NEVER, ALWAYS = FixedThreshold(2.0), FixedThreshold(-1.0)
POLICIES = {
    "full": lambda threshold: FullDepth(),
    "static": lambda threshold: StaticExit(3),
    "calm": lambda threshold: Calm(SoftmaxGap(), threshold),
    "free": lambda threshold: Free(2, SoftmaxGap(), threshold),
    "lossless": lambda threshold: Free(2, SoftmaxGap(), threshold, lossless=True),
    "free-copy": lambda threshold: Free(2, SoftmaxGap(), threshold, copy_skipped=True),
}


def decode(model, inputs, policy=None, stats=None, **options):
    options = {"max_length": LENGTH, "do_sample": False} | options
    return model.generate(
        **inputs, custom_generate=early_exit_decode, exit_policy=policy, decode_stats=stats, **options
    )


def never_exiting(num_layers):
    return {
        "full": FullDepth(),
        "static": StaticExit(num_layers),
        "calm": Calm(SoftmaxGap(), NEVER),
        "free": Free(2, SoftmaxGap(), NEVER),
    }


class EveryThirdDeep(FixedThreshold):
    """Two tokens exit, the third runs all layers, and so on."""

    def __init__(self):
        super().__init__(0.5)

    def at(self, position):
        return 2.0 if position % 3 == 2 else -1.0


def sometimes(model, inputs, layer=2, **options):
    """The threshold that about half of the tokens pass at `layer`."""
    stats = DecodeStats()
    decode(model, inputs, Free(layer, SoftmaxGap(), NEVER), stats, **options)
    values = [row for step in stats.confidences for row in step[0]]
    return FixedThreshold(sorted(values)[len(values) // 2])


class DeepLogits(Free):
    """FREE with a scripted exit decision, which records the logits of its deep passes."""

    def __init__(self, exits):
        super().__init__(2, SoftmaxGap(), FixedThreshold(0.0))
        self.exits = exits
        self.recorded = {}

    def step(self, view, state, token_ids, position, active):
        self.threshold.value = -1.0 if self.exits[position] else 2.0
        result = super().step(view, state, token_ids, position, active)
        if result.deep_pass:
            self.recorded[position] = result.logits
        return result


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    """Is shown drafts, which `put` must confirm in their order."""

    def __init__(self):
        super().__init__()
        self.drafts, self.taken_back, self.confirmed = [], 0, 0

    def put_draft(self, value):
        self.drafts += value.tolist()

    def take_back(self, count):
        assert 0 < count <= len(self.drafts)
        self.taken_back += count
        del self.drafts[-count:]

    def put(self, value):
        super().put(value)
        if self.drafts:
            assert [self.drafts.pop(0)] == value.tolist()
            self.confirmed += 1
