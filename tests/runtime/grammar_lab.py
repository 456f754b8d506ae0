"""What tests of grammars share."""

from edgeroute.runtime.grammar import Grammar
from edgeroute.runtime.tokenizer import Tokenizer


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether the grammar admits the text as a whole, token by token."""
    with Grammar(tokenizer, grammar) as compiled:
        for token_id in tokenizer.encode(text, add_special=False, parse_special=False):
            if not compiled.allows(token_id):
                return False
            compiled.accept(token_id)
        return tokenizer.eos is not None and compiled.allows(tokenizer.eos)
