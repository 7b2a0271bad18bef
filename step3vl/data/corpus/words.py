"""Words for generated text: a short list of common ones, and pronounceable ones that no language model can guess."""

from __future__ import annotations

import random

_TEXT = (
    "amber anchor apple arrow autumn basket beacon bell bird blossom boat book bottle branch bread bridge bright "
    "bronze brook brush button cabin candle canyon carpet castle cedar chair cherry circle city clay cliff clock "
    "cloud clover coast coffee comet copper coral cotton crane creek crystal daisy dawn desert diamond door "
    "dragon dream drum eagle early earth east echo ember engine evening falcon feather fern field finch fire "
    "flame flint flower forest fountain fox frost garden gate ginger glass gold granite grape grass green grove "
    "guitar hammer harbor harvest hazel heart hill honey horizon horse house ice iron island ivory jade juniper "
    "kettle kite lake lamp lantern leaf lemon letter light lily linen lion maple marble market meadow mill mint "
    "mirror mist moon morning mountain music needle nest north oak ocean olive onyx orange orchard otter owl "
    "paint paper pearl pebble pepper piano pine planet plum pocket pond poppy quartz quiet rabbit rain raven reed "
    "ribbon ridge river robin rock rose ruby sail salt sand silver sky slate snow song south sparrow spring "
    "spruce star stone storm stream summer sun swan table temple thunder tiger timber topaz tower train tulip "
    "valley velvet violet walnut water wave west wheat willow wind window winter wolf wood yellow"
)
WORDS = _TEXT.split()


RUDE = {"SEX", "TIT", "FAG", "NIG", "DIK", "COK", "POO", "PEE", "NAZI", "ANAL", "ANUS", "RAPE", "HOMO", "PUSY"}


def pseudo_word(rng: random.Random, length: int) -> str:
    """Capitals, consonant and vowel in turn: "TAB", "OKE", "MILU"."""
    while True:
        start = rng.randrange(2)
        letters = (rng.choice("AEIOUY" if (k + start) % 2 else "BCDFGHJKLMNPQRSTVWXZ") for k in range(length))
        if (word := "".join(letters)) not in RUDE:
            return word
