# An image for the CPU with the `memformer` command, which runs without root and writes to /runs.
#
#   docker build -t memformer .
#   docker run --rm -v memformer-runs:/runs memformer
#       trains the demo, about two minutes
#   docker run --rm -v memformer-runs:/runs memformer retention runs/fact --distances 1 100 10000
#       shows how long the trained memory lasts
FROM python:3.11-slim

WORKDIR /memformer
COPY . .
# On Linux, pip takes PyTorch's CUDA build, which is several gigabytes larger; uv can ask for the
# CPU build.
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

# The command is the container's first process and gets the signal of `docker stop`: it then
# finishes the update, saves and exits.
ENTRYPOINT ["memformer"]
CMD ["train", "experiments/retention/fact.yaml", "--folder", "runs/fact"]
