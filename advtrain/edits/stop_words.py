"""Function words of English, which the threat models of words leave as they are by default.

The list follows the English stop words of the Snowball stemmer (snowballstem.org, BSD license), with the pieces into
which a tokenizer splits a contraction, such as `do n't` or `don ' t`, and the words `can`, `will`, `just` and `now`.
"""

from __future__ import annotations

_PRONOUNS = """
    i me my myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves what which who whom this that these those
"""
_VERBS = """
    am is are was were be been being have has had having do does did doing would should could ought can will
"""
_CONTRACTIONS = """
    i'm you're he's she's it's we're they're i've you've we've they've i'd you'd he'd she'd we'd they'd i'll you'll
    he'll she'll we'll they'll isn't aren't wasn't weren't hasn't haven't hadn't doesn't don't didn't won't wouldn't
    shan't shouldn't can't cannot couldn't mustn't mightn't needn't let's that's that'll who's what's here's there's
    when's where's why's how's should've
"""
_PIECES = """
    s t d m o y ll re ve ma n't 's 'm 'd 'll 're 've ain aren couldn didn doesn don hadn hasn haven isn mightn mustn
    needn shan shouldn wasn weren won wouldn
"""
_OTHERS = """
    a an the and but if or because as until while of at by for with about against between into through during before
    after above below to from up down in out on off over under again further then once here there when where why how all
    any both each few more most other some such no nor not only own same so than too very just now
"""

#: Function words in lower case, with the apostrophe '.
STOP_WORDS = frozenset(f"{_PRONOUNS} {_VERBS} {_CONTRACTIONS} {_PIECES} {_OTHERS}".split())
