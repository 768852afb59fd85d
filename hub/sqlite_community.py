"""The tables of what people of a server say and may do; `server/community.py` keeps it.

They are in `registry.sqlite` because their rows go where their repository goes.
"""

from __future__ import annotations

COMMUNITY = """
CREATE TABLE gates (
    repository INTEGER PRIMARY KEY REFERENCES repositories (id) ON DELETE CASCADE,
    mode TEXT NOT NULL            -- auto, manual
);
CREATE TABLE access (
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    user TEXT NOT NULL,           -- in lower case
    status TEXT NOT NULL,         -- pending, accepted, rejected
    time INTEGER NOT NULL,
    PRIMARY KEY (repository, user)
) WITHOUT ROWID;
CREATE TABLE discussions (
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    title TEXT NOT NULL,
    author TEXT NOT NULL,
    status TEXT NOT NULL,         -- draft, open, closed, merged
    created INTEGER NOT NULL,
    base TEXT,                    -- of a pull request: the commit that it starts from
    merged TEXT,                  -- the commit that took it in
    PRIMARY KEY (repository, number)
) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    repository INTEGER NOT NULL,
    discussion INTEGER NOT NULL,
    kind TEXT NOT NULL,
    author TEXT NOT NULL,
    time INTEGER NOT NULL,
    data TEXT NOT NULL,           -- JSON object
    FOREIGN KEY (repository, discussion) REFERENCES discussions (repository, number) ON DELETE CASCADE
);
CREATE INDEX events_by_discussion ON events (repository, discussion);
CREATE TABLE scans (
    sha256 TEXT PRIMARY KEY,
    found TEXT NOT NULL           -- JSON
) WITHOUT ROWID;
"""
