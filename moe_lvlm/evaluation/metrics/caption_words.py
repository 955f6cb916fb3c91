"""Captions cut into words, as the COCO caption evaluation cuts them before it counts.

There a Java program does it: Stanford's PTBTokenizer (CoreNLP 3.4.1, `-lowerCase`), after which marks go. These rules
were written from what that program gives, not from its source; docs/evaluation.md says where the two differ.
"""

from __future__ import annotations

import re

# Words that keep their period: always, with a capital only, before a number only.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn ct dak fla ga ind kan ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo
    inc co cos corp ltd plc pte pty rt bancorp bhd assn univ intl sys tel est ext sq jr bros esq etc al seq bldg
    mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj sgt cpl pvt capt st
    ste ave pres lieut hon brig cmdr comdr pfc spc supt supts det mt ft adj adv asst assoc ens insp mlle mme msgr sfc sr
    invt elec natl mfg mtg dept blvd rd vs alex wm jos cie cf ph
"""
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBER_ABBREVIATIONS = "art arts ca fig figs no nos op para paras pp prop sect sects"


def _any_of(words: str) -> str:
    return "|".join(words.split())


_LETTER = r"[^\W\d_]"
_SIGN = r"[^\W_]"  # a letter or a digit
_END = rf"(?!{_SIGN})"

# The first that fits counts. Curly apostrophes are straight by then.
_TOKENS = (
    # most words, at little cost
    rf"(?!cannot|gimme|gonna|gotta|lemme|wanna){_LETTER}+(?=\s|\Z)",
    # do n't, can not, gon na, dog 's
    rf"[a-z]*[a-mo-z](?=n't{_END})",
    rf"n't{_END}",
    rf"can(?=not{_END})|(?:gon|wan)(?=na{_END})|got(?=ta{_END})|(?:gim|lem)(?=me{_END})",
    rf"'(?:[dms]|ll|re|ve)(?!{_LETTER})",
    # st., Miss., no. 5, u.s.
    rf"(?:{_any_of(_ABBREVIATIONS)})\.{_END}",
    rf"(?-i:{_any_of(_CAPITAL_ABBREVIATIONS)})\.{_END}",
    rf"(?:{_any_of(_NUMBER_ABBREVIATIONS)})\.(?=\s?\d)",
    rf"(?:[a-z]\.)+{_END}",
    # o'clock, ma'am, '80s, rock 'n' roll
    rf"[dlo]'{_SIGN}+(?:-{_SIGN}+)*|{_LETTER}+[aeiouy]'[aeiou]{_LETTER}*",
    rf"'(?:[2-9]0s|em|till?|n(?:'|(?!{_LETTER})))",
    # addresses; and/or; black-and-white, 3.5-inch; B&W
    r"https?://[^\s\"<>|(){}]*[\w/]|[\w.%+-]+@[\w.-]*\w",
    rf"{_SIGN}+(?:-{_LETTER}+){{0,2}}(?:/{_SIGN}+(?:-{_LETTER}+){{0,2}}){{1,2}}",
    rf"{_SIGN}(?:{_SIGN}|[.,](?={_SIGN}))*(?:-{_SIGN}+)+|{_SIGN}+(?:[-_]{_SIGN}+)+",
    r"(?-i:[A-Z]+(?:[&+][A-Z]+)+)",
    # words, also where the space after a sentence is missing ("tree.the"); 10:30, -5, 7up
    rf"{_LETTER}{_SIGN}*(?:[.!?]{_LETTER}{_SIGN}*)*",
    rf"[+-]?(?:\d++(?:[.:,]\d++)++|(?:[.,]\d++)++|\d++(?!{_LETTER}))|{_SIGN}+",
    rf"[@#]{_LETTER}\w*",
    # marks
    r"[?!]+|\.+|-+|\*+|#+|_+|@+|\S",
)
_TOKEN = re.compile("|".join(_TOKENS), re.IGNORECASE)
_DROPPED = re.compile("['`\"“”‘«»–—…,:;?!]|\\.+|-{1,4}")

# Brackets stay: the published list of marks that go has them in capitals (-LRB-), but by then the text is in lower case
# (-lrb-), and scores depend on it.
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RENAMED |= {"€": "$", "£": "#", "¢": "cents"}
_LAST_KNOWN = "\uffff"  # emoji are beyond it, and the program leaves them out


def caption_words(text: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation: "The dog's T-shirt." -> the, dog, 's, t-shirt."""
    tokens = _TOKEN.findall(text.replace("’", "'"))
    return [
        _RENAMED.get(token, token.lower())
        for token in tokens
        if token[0] <= _LAST_KNOWN and not _DROPPED.fullmatch(token)
    ]
