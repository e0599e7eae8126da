# moe-serve as a container: one process tree, no root, nothing written outside of /tmp, /dev/shm and mounted folders.
#   docker build --tag registry.example/moe-serve:0.1.0 .
# PIP_ARGUMENTS chooses where packages come from, such as an index with CPU or CUDA builds of torch.
FROM python:3.12-slim AS build
ARG PIP_ARGUMENTS=""
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY moe_serve ./moe_serve
RUN python -m venv /opt/moe-serve && /opt/moe-serve/bin/pip install --no-cache-dir ${PIP_ARGUMENTS} .

FROM python:3.12-slim
COPY --from=build /opt/moe-serve /opt/moe-serve
ENV PATH=/opt/moe-serve/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
# A number, so that Kubernetes can see that it is not root; the same as in the manifests.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
ENTRYPOINT ["moe-serve"]
CMD ["serve", "--host", "0.0.0.0"]
