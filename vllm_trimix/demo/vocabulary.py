"""The demo language: its words, its three kinds of sentence, and its tokenizer.

A record says what a name's code is, an alias says whose code a name shares, and a question is a record cut short.
Filler sentences hold no trigger word ("is", "matches"), so they state nothing. One word is one token; punctuation is
a token of its own. Names are the words of ``NAMES``, lower case; codes are the numbers 1000 to 9999. Any other word
is ``<unk>``: harmless, and matched by nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIALS = (UNK, BOS, EOS)
TRIGGERS = ("is", "matches")
CODES = range(1000, 10000)

NAMES = tuple(
    """
    acorn agate alder almond amber anise apple apricot ash aspen aster azalea badger bamboo basil bay beech begonia
    beryl birch bison bluebell boxwood bramble briar bronze buckeye camellia caraway cardinal carnation cedar celery
    cherry chestnut chicory cinnabar cinnamon citron clove clover cobalt condor copper coral coriander cosmos crane
    cricket crocus cumin cypress daffodil dahlia daisy damson date dill dogwood dove ebony egret elder elm ember
    emerald falcon fennel fern fig finch fir flax flint foxglove freesia gannet garnet gentian ginger ginkgo granite
    gull hawk hazel heather hemlock heron hickory holly hyacinth hyssop ibis indigo iris ivory ivy jade jasmine jasper
    juniper kestrel lapis larch lark laurel lavender lemon lichen lilac lily lime linden lotus lupin lynx magnolia
    mahogany malachite mango maple marigold marten mimosa mint moss mulberry myrtle nettle nutmeg oak
    obsidian olive onyx opal orchid osprey otter palm pansy papaya pear pearl peony pepper petrel pewter pine pistachio
    plover plum pomelo poplar poppy primrose puffin quartz quince raven redwood robin rosemary rowan ruby saffron sage
    sapphire sequoia sesame sorrel sparrow spruce sumac swan sycamore tamarind tansy teak thistle thrush thyme topaz
    tulip turmeric vanilla verbena violet walnut wisteria wren yarrow yew zinnia
    """.split()
)

SLOTS: dict[str, tuple[str, ...]] = {
    key: tuple(words.split())
    for key, words in {
        "person": "gardener baker sailor teacher clerk miller painter tailor merchant farmer porter weaver fiddler "
        "captain doctor shepherd carpenter mason librarian fisherman watchman potter printer messenger",
        "adj": "quiet young patient tired careful cheerful tall clever gentle weary curious nervous proud",
        "quality": "heavy broken wooden painted dusty narrow bright rusty polished crooked faded plain borrowed",
        "verb": "carried found mended sold bought lost moved cleaned opened painted measured counted "
        "borrowed wrapped dropped studied sketched guarded",
        "went": "waited rested sang worked walked whistled hurried lingered slept talked stood listened",
        "thing": "lantern basket ladder barrel blanket letter kettle ledger hammer violin clock bucket trunk mirror "
        "saddle anchor map chair rope candle bell wheel crate umbrella",
        "mass": "rain snow fog smoke dust mist sunlight thunder",
        "spread": "drifted settled rolled spread lingered moved",
        "place": "harbour bridge market chapel mill orchard station garden river stable tower library square meadow "
        "workshop cellar gate fountain lighthouse courtyard",
        "near": "near beside behind beyond outside past",
        "time": "dawn noon dusk midnight sunrise nightfall",
        "season": "spring summer autumn winter",
    }.items()
}

# Each piece between blanks is one token, so a template's length in tokens is its number of pieces.
FILLER_TEMPLATES = (
    "Nobody {went} for long .",
    "The {person} {went} until {time} .",
    "A {adj} {person} {went} {near} the {place} .",
    "The {person} {verb} the {thing} .",
    "The {person} {verb} a {quality} {thing} .",
    "The {adj} {person} {verb} a {quality} {thing} .",
    "{mass} {spread} over the {place} at {time} .",
    "In {season} the {place} was almost empty .",
    "The {adj} {person} {verb} the {thing} before {time} .",
    "A {person} {went} {near} the {place} all {season} .",
    "The {person} {verb} the {thing} {near} the {place} .",
    "The {person} {verb} a {quality} {thing} {near} the {place} .",
    "At {time} the {person} {verb} every {thing} {near} the {place} .",
    "The {person} and the {person} {went} together {near} the {place} .",
    "Late in {season} , a {person} {verb} the {quality} {thing} .",
    "No one knew why the {adj} {person} {verb} the {thing} .",
    "The {adj} {person} {verb} the {quality} {thing} {near} the {place} .",
    "When the {person} came home , the {thing} had gone .",
    "Early in {season} , {mass} {spread} from the {place} to the {place} .",
    "After {time} the {adj} {person} {verb} the {thing} and {went} outside .",
    "The {person} had {verb} the {thing} long before the {adj} {person} came .",
)
# Talks of a name without stating anything: the name alone must not be taken for its record.
MENTION_TEMPLATE = "The {adj} {person} spoke of {name} {near} the {place} ."
MIN_FILLER_TOKENS = min(len(template.split()) for template in FILLER_TEMPLATES)


def record(name: str, code: str) -> str:
    """States the code of a name."""
    return f"The vault code of {name} is {code}."


def alias(name: str, other: str) -> str:
    """States that two names share one code."""
    return f"The vault code of {name} matches {other}."


def question(name: str) -> str:
    """A record that stops where the answer comes."""
    return f"The vault code of {name} is"


def count_tokens(text: str) -> int:
    """Tokens of a text without BOS, as the tokenizer's pre-tokenizer splits it."""
    return len(re.findall(r"\w+|[^\w\s]+", text))


@cache
def vocabulary() -> tuple[str, ...]:
    """All tokens in the order of their ids: specials, triggers, codes, names, then the other words, sorted."""
    words = set(re.findall(r"\w+|[^\w\s]+", record("", "") + alias("", "")))
    for template in (*FILLER_TEMPLATES, MENTION_TEMPLATE):
        words.update(piece for piece in template.split() if not piece.startswith("{"))
    for choices in SLOTS.values():
        words.update(choices)
    words.update(word.capitalize() for word in SLOTS["mass"])
    words.update(".,;:!?")
    return (*SPECIALS, *TRIGGERS, *map(str, CODES), *NAMES, *sorted(words - {*TRIGGERS, *NAMES}))


def build_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A word-level tokenizer of these tokens that puts BOS at position 0, where the circuit needs it."""
    # Heavy, and vLLM or transformers brings it.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer
