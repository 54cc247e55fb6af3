CREATE TABLE bases (
root VARCHAR NOT NULL,
digest VARCHAR NOT NULL,
source VARCHAR NOT NULL,
revision VARCHAR,
tensors BIGINT NOT NULL,
parameters BIGINT NOT NULL,
bytes BIGINT NOT NULL,
dtype VARCHAR NOT NULL,
architecture VARCHAR,
created_at VARCHAR NOT NULL,
CONSTRAINT pk_bases PRIMARY KEY (root),
CONSTRAINT fk_bases_logs FOREIGN KEY(root) REFERENCES logs (root)
)
WITHOUT ROWID;
CREATE TABLE entries (
digest VARCHAR NOT NULL,
root VARCHAR NOT NULL,
sequence BIGINT NOT NULL,
kind VARCHAR NOT NULL,
name VARCHAR NOT NULL,
time VARCHAR NOT NULL,
author VARCHAR NOT NULL,
predecessor VARCHAR,
CONSTRAINT pk_entries PRIMARY KEY (digest),
CONSTRAINT uq_entries_root_sequence UNIQUE (root, sequence),
CONSTRAINT fk_entries_logs FOREIGN KEY(root) REFERENCES logs (root)
)
WITHOUT ROWID;
CREATE TABLE labels (
root VARCHAR NOT NULL,
number BIGINT NOT NULL,
"key" VARCHAR NOT NULL,
value VARCHAR NOT NULL,
CONSTRAINT pk_labels PRIMARY KEY (root, number, "key"),
CONSTRAINT fk_labels_versions FOREIGN KEY(root, number) REFERENCES versions (root, number)
)
WITHOUT ROWID;
CREATE TABLE logs (
root VARCHAR NOT NULL,
kind VARCHAR NOT NULL,
name VARCHAR,
head VARCHAR NOT NULL,
next_number BIGINT NOT NULL,
removed BOOLEAN NOT NULL,
CONSTRAINT pk_logs PRIMARY KEY (root),
CONSTRAINT uq_logs_kind_name UNIQUE (kind, name)
)
WITHOUT ROWID;
CREATE TABLE metrics (
root VARCHAR NOT NULL,
number BIGINT NOT NULL,
"key" VARCHAR NOT NULL,
value DOUBLE NOT NULL,
CONSTRAINT pk_metrics PRIMARY KEY (root, number, "key"),
CONSTRAINT fk_metrics_versions FOREIGN KEY(root, number) REFERENCES versions (root, number)
)
WITHOUT ROWID;
CREATE TABLE parents (
root VARCHAR NOT NULL,
number BIGINT NOT NULL,
position BIGINT NOT NULL,
ref VARCHAR NOT NULL,
digest VARCHAR NOT NULL,
CONSTRAINT pk_parents PRIMARY KEY (root, number, position),
CONSTRAINT fk_parents_versions FOREIGN KEY(root, number) REFERENCES versions (root, number)
)
WITHOUT ROWID;
CREATE TABLE remotes (
root VARCHAR NOT NULL,
url VARCHAR NOT NULL,
created_at VARCHAR NOT NULL,
CONSTRAINT pk_remotes PRIMARY KEY (root),
CONSTRAINT fk_remotes_logs FOREIGN KEY(root) REFERENCES logs (root)
)
WITHOUT ROWID;
CREATE TABLE tags (
root VARCHAR NOT NULL,
tag VARCHAR NOT NULL,
number BIGINT NOT NULL,
CONSTRAINT pk_tags PRIMARY KEY (root, tag),
CONSTRAINT fk_tags_versions FOREIGN KEY(root, number) REFERENCES versions (root, number)
)
WITHOUT ROWID;
CREATE TABLE version_files (
root VARCHAR NOT NULL,
number BIGINT NOT NULL,
path VARCHAR NOT NULL,
digest VARCHAR NOT NULL,
bytes BIGINT NOT NULL,
CONSTRAINT pk_version_files PRIMARY KEY (root, number, path),
CONSTRAINT fk_version_files_versions FOREIGN KEY(root, number) REFERENCES versions (root, number)
)
WITHOUT ROWID;
CREATE TABLE version_modules (
root VARCHAR NOT NULL,
number BIGINT NOT NULL,
reversed_name VARCHAR NOT NULL,
CONSTRAINT pk_version_modules PRIMARY KEY (root, number, reversed_name),
CONSTRAINT fk_version_modules_versions FOREIGN KEY(root, number) REFERENCES versions (root, number)
)
WITHOUT ROWID;
CREATE TABLE versions (
root VARCHAR NOT NULL,
number BIGINT NOT NULL,
digest VARCHAR NOT NULL,
weights_digest VARCHAR NOT NULL,
base_digest VARCHAR,
method VARCHAR NOT NULL,
format VARCHAR NOT NULL,
rank BIGINT,
ranks JSON NOT NULL,
alpha DOUBLE,
scaling DOUBLE,
target_modules JSON NOT NULL,
parameters BIGINT NOT NULL,
bytes BIGINT NOT NULL,
dtype VARCHAR NOT NULL,
message VARCHAR NOT NULL,
created_at VARCHAR NOT NULL,
entry VARCHAR NOT NULL,
removed BOOLEAN NOT NULL,
CONSTRAINT pk_versions PRIMARY KEY (root, number),
CONSTRAINT fk_versions_logs FOREIGN KEY(root) REFERENCES logs (root),
CONSTRAINT fk_versions_entries FOREIGN KEY(entry) REFERENCES entries (digest)
)
WITHOUT ROWID;
CREATE TABLE workspace (
uuid VARCHAR NOT NULL,
CONSTRAINT pk_workspace PRIMARY KEY (uuid)
)
WITHOUT ROWID;
CREATE INDEX ix_bases_digest ON bases (digest);
CREATE INDEX ix_labels_key_value ON labels ("key", value);
CREATE INDEX ix_metrics_key_value ON metrics ("key", value);
CREATE INDEX ix_parents_digest ON parents (digest);
CREATE INDEX ix_tags_tag ON tags (tag);
CREATE INDEX ix_version_files_digest ON version_files (digest);
CREATE INDEX ix_version_modules_reversed_name ON version_modules (reversed_name);
CREATE INDEX ix_versions_base_digest ON versions (base_digest);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE INDEX ix_versions_method ON versions (method);
CREATE INDEX ix_versions_rank ON versions (rank);
