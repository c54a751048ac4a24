"""The OpenAI-compatible server: API process, engine process and the protocol between them."""
