"""The xDS management server: messages, resources, snapshots and the protocol. It knows nothing of LLMs."""
