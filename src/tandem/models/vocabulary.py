"""Whether two models read the same token ids as the same tokens."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tandem.errors import UserError
from tandem.models.configuration import read_config
from tandem.models.load import load_tokenizer
from tandem.options.model import ModelOptions


def check_vocabulary(reference: str, policy: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference that would score other tokens than the policy's, before its weights are loaded.

    An embedding with more rows than the tokenizer needs, as many have for speed, does not count as another vocabulary.

    Args:
        tokenizer: the policy's.

    Raises:
        UserError: the reference's config cannot be read, it lacks ids of the tokenizer, or its own tokenizer gives them
            to other tokens.
    """
    flag = f"--reference_model {reference}"
    needed = max(tokenizer.get_vocab().values()) + 1
    config = read_config(reference, trust_remote_code=policy.trust_remote_code)
    size = config.get_text_config().vocab_size
    if size < needed:
        raise UserError(f"{flag}: has {size:,} tokens, and the policy's tokenizer {needed:,}: not of one vocabulary")
    try:
        own = load_tokenizer(replace(policy, model_name_or_path=reference, model_revision=None))
    except UserError:
        return  # a model without its tokenizer: its size is all there is to compare
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    apart = sorted(token for token, index in ours.items() if theirs.get(token, index) != index)
    if apart:
        raise UserError(
            f"{flag}: its tokenizer is another: {apart[0]!r} is token {theirs[apart[0]]}, and {ours[apart[0]]} of the "
            f"policy ({len(apart):,} tokens differ)"
        )
