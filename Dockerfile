# The GPU image: vLLM's official OpenAI-compatible server with TRIMIX as its attention backend.
#   docker build -t vllm-trimix .
#   docker run --gpus all --ipc=host -p 8000:8000 -v "$HOME/models:/models:ro" vllm-trimix /models/Llama-3.1-8B-Instruct
# It is linted but not built by this project's CI: the base image needs more disk than that machine has, and a GPU to run.
FROM vllm/vllm-openai:v0.32.0

# vLLM, torch and pydantic are in the base image; nothing is fetched.
COPY . /opt/vllm-trimix
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation /opt/vllm-trimix \
    && useradd --create-home --uid 10001 --shell /usr/sbin/nologin trimix

# By number, so that orchestrators can see that it is not root.
USER 10001
WORKDIR /home/trimix
ENV HF_HOME=/home/trimix/.cache/huggingface

EXPOSE 8000

# Loading a large model takes minutes; until then a failure doesn't count.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# The model and further options of `vllm serve` follow as the command. vLLM listens on all interfaces inside the container.
ENTRYPOINT ["vllm", "serve", "--attention-backend", "TRIMIX", "--host", "0.0.0.0", "--port", "8000"]
