//! Identifiers. Each is a newtype, so that none is mistaken for another.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::{DecodeError, Reader, Writer};

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u128);
        impl $name {
            /// The id that stands for "none"; never drawn.
            pub const NIL: Self = Self(0);
            /// Appends the id, 16 bytes little-endian.
            pub fn encode(self, out: &mut Writer) {
                out.u128(self.0);
            }
            /// Reads what [`Self::encode`] wrote.
            pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(Self(input.u128()?))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:08x})"), self.0 >> 96)
            }
        }
        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(format!("'{text}' is not a {}: expected 32 hexadecimal digits", stringify!($name)));
                }
                u128::from_str_radix(text, 16)
                    .map(Self)
                    .map_err(|_| format!("'{text}' is not a {}: expected 32 hexadecimal digits", stringify!($name)))
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! id64 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, serde::Serialize, serde::Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);
        impl $name {
            /// Zero: before the first.
            pub const ZERO: Self = Self(0);
            /// The next one.
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
            /// Appends the number, 8 bytes little-endian.
            pub fn encode(self, out: &mut Writer) {
                out.u64(self.0);
            }
            /// Reads what [`Self::encode`] wrote.
            pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(Self(input.u64()?))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id128!(
    /// The nodes that share one catalog. Drawn once, when the cluster is made.
    ClusterId
);
id128!(
    /// One disk or directory of a node. Also the address of a shard on the network: a store is served by one shard.
    StoreId
);
id128!(
    /// A volume, whatever replicas and incarnations it has.
    VolumeId
);
id128!(
    /// One Raft group. A volume has one per incarnation; the catalog has [`GroupId::CATALOG`].
    GroupId
);
id128!(
    /// A running client of an attachment; drawn anew at each start of the daemon that holds it.
    SessionId
);
id128!(
    /// One attachment of a volume to a node. Survives that node's new epochs, ends with any other Attach or Detach.
    AttachmentId
);
id128!(
    /// A snapshot of a volume; drawn by who asks for it, so that a repeated request names the same one.
    SnapshotId
);
id128!(
    /// One start of a daemon.
    DaemonStart
);
id128!(
    /// One forced recovery of a volume; drawn by who asks for it, so that a repeated request names the same one.
    RecoveryId
);

impl GroupId {
    /// The group of the cluster's catalog.
    pub const CATALOG: Self = Self(1);
}

id64!(
    /// A voter or learner within a cluster. Given out by the catalog, never reused: a replica whose store was
    /// wiped comes back under a new one.
    ReplicaId
);
id64!(
    /// Fencing number of an attachment; only grows.
    Epoch
);
id64!(
    /// Number of a request within an attachment; starts at 1.
    Seq
);
id64!(
    /// Position in a Raft log.
    LogIndex
);
id64!(
    /// Raft term.
    Term
);

/// The name of a node, as operators and Kubernetes know it; unique within a cluster.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct NodeName(pub String);

impl NodeName {
    /// A name; use [`crate::limits::check_name`] on what users type.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// Appends the name, length first.
    pub fn encode(&self, out: &mut Writer) {
        out.text(&self.0);
    }
    /// Reads what [`Self::encode`] wrote.
    pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self(input.text(crate::limits::NAME_LENGTH_MAX)?))
    }
}
impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text() {
        let id = VolumeId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(id.to_string().parse::<VolumeId>(), Ok(id));
        assert!("xyz".parse::<VolumeId>().is_err());
    }
}
