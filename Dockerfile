# An image for the CPU with the `memformer` command, which runs as an ordinary user and writes to /runs.
#
#   docker build -t memformer .
#   docker run --rm -v memformer-runs:/runs memformer                 train the demo, about three minutes
#   docker run --rm -v memformer-runs:/runs memformer generate runs/demo --prompt "import os"
FROM python:3.11-slim

WORKDIR /memformer
COPY . .
# On Linux, pip takes PyTorch's CUDA build, which is several gigabytes larger; uv can ask for the CPU build.
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend cpu --constraints constraints.txt . \
    && pip uninstall --yes uv

# Configs write to runs/, relative to where the command starts: the link leads them to the volume.
RUN useradd --create-home --uid 1000 memformer \
    && mkdir /runs \
    && chown memformer:memformer /runs \
    && ln -s /runs runs
USER memformer
VOLUME /runs

# The command is the container's first process, so that `docker stop` lets it finish the update and save.
ENTRYPOINT ["memformer"]
CMD ["train", "experiments/demo.yaml"]
