"""The HTTP API: OpenAI's shapes in and out, token ids and the engine protocol behind."""
