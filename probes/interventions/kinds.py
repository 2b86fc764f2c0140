"""The kinds of line that an intervention can be: template, words and example of each. The whole language follows from this table.

A template names the fields of a kind in braces, as `language.Operation` has them; brackets hold what may be left out. `place` is a part
and a layer, or a hook point; `heads` a head or a layer; `gate` a gate of a layer; `layered` a layer, with or without heads; `inner` a
layer and levels or rows of its state; `tokens` the field `at` as a list.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What one kind of line looks like and does. `group` is the heading that it is listed under, `example` what follows its verb."""

    group: str
    template: str
    words: str
    example: str

    @property
    def verb(self) -> str:
        """The first word."""
        return self.template.partition(" ")[0]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that its template names, in order."""
        return tuple(re.findall(r"{(\w+)}", self.template))

    @property
    def required(self) -> tuple[str, ...]:
        """Those that may not be left out."""
        return tuple(re.findall(r"{(\w+)}", re.sub(r"\[.*?\]", "", self.template)))


TAKE, MOVE, READ, STATE, FEATURE, BDH = "Take away", "Change", "Attention", "State", "Features", "Memory of a BDH"
KINDS: dict[str, Kind] = {
    "zero": Kind(TAKE, "zero {place}[ at {at}]", "Put zeros in its place.", "head 1.3"),
    "mean": Kind(TAKE, "mean {place}[ at {at}][ from: {texts}]",
                 "Put its mean in its place, over all tokens of the prompts or of other texts.", "mlp 1"),
    "resample": Kind(TAKE, "resample {place}[ at {at}][ from: {texts}]",
                     "Put in what it was at the same token of another prompt, or of one of these texts.", "head 1.0 from: another text"),
    "scale": Kind(MOVE, "scale {place} by {by}[ at {at}]", "Multiply it.", "mixer 1 by 0.5"),
    "patch": Kind(MOVE, "patch {place}[ at {at}] from: {texts}", "Put in what it is at the same token of another text.",
                  "resid 1 at -1 from: another text"),
    "steer": Kind(MOVE, "steer {place} by {by}[ at {at}][ random {random}] from: {texts}",
                  "Add a direction: the difference of two texts' means, times a coefficient.", "resid_post 1 by 2 from: good || bad"),
    "erase": Kind(MOVE, "erase {place}[ at {at}][ random {random}] from: {texts}",
                  "Project out a direction: the difference of two texts' means.", "resid_post 1 from: good || bad"),
    "cut": Kind(READ, "cut {heads}[ queries {queries}] keys {keys}", "These tokens no longer read those.",
                "head 1.3 queries 10:20 keys 3"),
    "calibrate": Kind(READ, "calibrate {heads} by {by}",
                      "Take weight from sinks after the first token (ACT); what is freed goes to the row's others.", "head 1.3 by 0.4"),
    "keep": Kind(READ, "keep {heads} top {count}", "Each token reads only its largest scores.", "head 1.3 top 8"),
    "window": Kind(READ, "window {heads} sinks {sinks} last {count}", "Each token reads only the first tokens and the last.",
                   "layer 1 sinks 4 last 16"),
    "stream": Kind(READ, "stream {heads} sinks {sinks} last {count}",
                   "Each token reads only the first tokens and the last, at positions counted within these (StreamingLLM).",
                   "layer 1 sinks 4 last 16"),
    "star": Kind(READ, "star {heads} block {count} after {after}",
                 "Up to a token, each reads its own block of so many and the first block; later ones read everything (Star Attention).",
                 "layer 1 block 8 after 24"),
    "separate": Kind(READ, "separate {heads} contexts {keys}",
                     "These stretches do not read each other; what stands before them is shared (parallel context encoding).",
                     "layer 1 contexts 4:12,12:20"),
    "renumber": Kind(READ, "renumber contexts {keys}",
                     "In all layers, each of these stretches begins at the position of the first one.", "contexts 4:12,12:20"),
    "base": Kind(READ, "base {heads} to {to}", "Rotary positions with another base (one pass of Attention Buckets).", "layer 1 to 20000"),
    "freeze-state": Kind(STATE, "freeze state {layered} at {at}", "The state passes these tokens unchanged.", "state 1 at 10:20"),
    "reset": Kind(STATE, "reset state {layered} after {after}", "The state forgets everything.", "state 1 after 20"),
    "scale-state": Kind(STATE, "scale state {layered} by {by} after {after}", "Multiply the state.",
                        "state 1 by 0.5 after 20"),
    "patch-state": Kind(STATE, "patch state {layered} after {after} from: {texts}",
                        "The state that another text leaves after the same token.",
                        "state 1 after 20 from: another text"),
    "forget": Kind(STATE, "forget state {layered} key {keys} after {after}",
                   "Erase what the memory answers to the key of a token.", "state 1 key 5 after 20"),
    "implant": Kind(STATE, "implant state {layered} key {keys} value {at} after {after}",
                    "Let the memory answer the key of one token with the value of another.", "state 1 key 5 value 9 after 20"),
    "hold": Kind(STATE, "hold {gate} to {to}[ at {at}]", "Hold a gate at a value; of a decay, the share kept per token.", "decay 1 to 0.9"),
    "write": Kind(STATE, "write {layered} by {by}[ at {at}]", "These tokens write more, less or nothing (0).", "1 by 0 at 10:20"),
    "levels": Kind(STATE, "levels {inner}[ at {at}]", "Some levels of a log-linear layer are not read.", "1.2,3"),
    "modes": Kind(STATE, "modes {inner}[ at {at}]", "Some rows of the state are not read.", "1.0,1"),
    "feature": Kind(FEATURE, "feature {name} {units} to {to}",
                    "Hold features of a dictionary at a value; 0 takes them out.", "my-dictionary 17,18 to 0"),
    "feature-add": Kind(FEATURE, "feature {name} {units} add {by}", "Add so much of features.", "my-dictionary 17 add 3"),
    "ablate": Kind(BDH, "ablate {synapse} after {after}", "Take out what was written into a synapse.", "1.0.210-2.2.190 after 40"),
    "clamp": Kind(BDH, "clamp {synapse} to {to} after {after}", "Set a synapse.", "1.0.210-2.2.190 to 3.0 after 40"),
    "copy": Kind(BDH, "copy {synapse} after {after} from: {texts}", "Set a synapse to its value at the end of another text.",
                 "1.0.210-2.2.190 after 40 from: text"),
    "mute": Kind(BDH, "mute {synapse}", "Leave a synapse out of the whole run.", "1.0.210-2.2.190"),
    "neurons": Kind(BDH, "neurons {neurons}", "Silence neurons, written head.neuron, in every layer.", "0.3 1.7"),
    "freeze": Kind(BDH, "freeze since {after}", "Nothing new is stored from a token on.", "since 40"),
    "block": Kind(BDH, "block {tokens}", "These tokens read nothing from the state.", "50 51"),
    "scale-layer": Kind(BDH, "scale layer {layered} by {by} after {after}", "Multiply a layer's state; 0 resets it.",
                        "layer 1 by 0.5 after 40"),
    "state": Kind(BDH, "state layer {layered} after {after} from: {texts}",
                  "A layer's state becomes what another text leaves at its end, moved to this distance.", "layer 1 after 40 from: text"),
}  # fmt: skip
PARTS = {
    "head": ("z",),
    "neuron": ("mlp_post", "neuron_gated"),
    "mlp": ("mlp_out",),
    "mixer": ("mixer_out", "mixer_out_pre"),
}
"""Parts of a layer by their short names: the roles that they are found by, the first that a layer has."""
OF_SYNAPSES = ("ablate", "clamp", "copy", "mute")
TWO_TEXTS = ("steer", "erase")
ONE_TEXT = ("patch", "patch-state", "copy", "state")
