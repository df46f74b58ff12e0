"""Chat templates that say which tokens are the assistant's, for `--assistant_only_loss`.

trl asks the chat template for a mask, which needs `{% generation %}` around what the assistant says. It has marked
versions of the templates of many models and refuses others, SmolLM's and plain ChatML among them; this adds these.
"""

from transformers import PreTrainedTokenizerBase


# One message in ChatML, as SmolLM, SmolLM2 and the models trained with trl's former ChatML default write it.
CHATML_MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"

# The same text. The assistant's part begins behind the header, which the prompt gives at inference, and ends with
# <|im_end|>, which the model must learn to say; nobody generates the line break behind it.
MARKED_MESSAGE = (
    "{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template with the assistant's part marked; it renders the same text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            With a chat template.

    Raises:
        ValueError: If there is no template, or one that neither this file nor trl knows.
    """
    from trl.chat_template_utils import get_training_chat_template

    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            "The tokenizer has no chat template: give --chat_template_path, a .jinja file or the name of a model "
            "whose template to use."
        )
    if isinstance(template, str) and CHATML_MESSAGE in _with_line_breaks(template):
        return _with_line_breaks(template).replace(CHATML_MESSAGE, MARKED_MESSAGE)
    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise ValueError(
            "--assistant_only_loss needs a chat template with {% generation %} and {% endgeneration %} around the "
            "assistant's part, and this one is not known: give a marked copy of it, --chat_template_path FILE.jinja."
        ) from error


def _with_line_breaks(template: str) -> str:
    """Templates hold a line break in a string as itself or as an escape; both mean the same."""
    return template.replace("\\n", "\n")
