"""The bundled editor: ComfyUI's own frontend over a server with ComfyUI's protocol, our nodes, and a worker process that trains."""
