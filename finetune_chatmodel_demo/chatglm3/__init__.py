"""ChatGLM3 in the tree: configuration, model, P-Tuning v2 prefix, tokenizer, and how to load them.

Importing this package registers the classes with transformers, so that `AutoConfig`, `AutoTokenizer`, `AutoModel` and
`AutoModelForCausalLM.from_pretrained(folder)` read official folders without any remote code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from finetune_chatmodel_demo.chatglm3.attention import register_prefix_attention
from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.loading import load_model, load_tokenizer
from finetune_chatmodel_demo.chatglm3.modeling import (
    ChatGLM3ForCausalLM,
    ChatGLM3ForSequenceClassification,
    ChatGLM3Model,
)
from finetune_chatmodel_demo.chatglm3.prefix import PrefixEncoder
from finetune_chatmodel_demo.chatglm3.prefix_files import (
    PrefixConfig,
    is_prefix_checkpoint,
    load_prefix,
    read_prefix_config,
    save_prefix,
)
from finetune_chatmodel_demo.chatglm3.tokenizer import ChatGLMTokenizer
from finetune_chatmodel_demo.chatglm3.weights import register_official_layout
from finetune_chatmodel_demo.common.errors import UserError

__all__ = [
    "ChatGLM3Config",
    "ChatGLM3ForCausalLM",
    "ChatGLM3ForSequenceClassification",
    "ChatGLM3Model",
    "ChatGLMTokenizer",
    "PrefixConfig",
    "PrefixEncoder",
    "PrefixError",
    "is_prefix_checkpoint",
    "load_model",
    "load_prefix",
    "load_tokenizer",
    "read_prefix_config",
    "save_prefix",
]

PrefixError = UserError  # its name in older programs

register_official_layout()
register_prefix_attention()
AutoConfig.register(ChatGLM3Config.model_type, ChatGLM3Config, exist_ok=True)
AutoTokenizer.register(ChatGLM3Config, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
# The official auto_map gives the model with its head under all three names.
AutoModel.register(ChatGLM3Config, ChatGLM3ForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(ChatGLM3Config, ChatGLM3ForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(ChatGLM3Config, ChatGLM3ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ChatGLM3Config, ChatGLM3ForSequenceClassification, exist_ok=True)
