"""Fine-tune ChatGLM3 on your own conversations: model, data, training and inference."""
