//! holdfast-frontend
