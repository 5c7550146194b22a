# One GPU machine, from the lock that `make setup-gpu` installs. No GPU is needed to build it, one to use it:
#   docker build -t runner .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v $PWD/outputs:/runner/outputs runner doctor gpu
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

ARG DEBIAN_FRONTEND=noninteractive
# python3.12 is Ubuntu 24.04's own; g++ and nvcc (of the base image) compile kernels, at build time and at their first use;
# libibverbs, librdmacm and the providers are what Mooncake (rollout.weight_transport=p2p) moves weights with; libnuma is SGLang's
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git ibverbs-providers libibverbs1 libnuma1 librdmacm1 make ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /runner
# The GPUs that Transformer Engine's and SGLang's kernels are compiled for: there is none here to ask
ARG CUDA_ARCHITECTURES="9.0"
ENV TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES} CUDA_HOME=/usr/local/cuda MAX_JOBS=8

COPY pyproject.toml hatch_build.py constraints-gpu.txt README.md LICENSE Makefile ./
COPY .ci ./.ci
COPY runner ./runner
COPY conf ./conf
COPY recipes ./recipes
RUN make setup-gpu PYTHON=python3.12

ENV PATH=/runner/.venv/bin:${PATH}
ENTRYPOINT ["runner"]
CMD ["doctor"]
